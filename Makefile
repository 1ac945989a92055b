# Each target sets up what it needs first. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
CORES ?= all
KILLS ?= 20
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Where it is set, every job would compile all of torch anew: half of its start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup table6 all plan report tiny test test-faults test-slurm test-conda lint format bench storage docs lock unlock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

$(BIN)/.ready: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile --progress-bar off --require-hashes --requirement requirements.lock
	touch $@

setup: $(BIN)/.ready ## environment in .venv, from the hashed lock file

table6: setup ## results/table6.csv and .md on the demo study
	$(BIN)/snakemake --cores $(CORES) results/table6.csv
	@echo && cat results/table6.md

# Snakemake asks anew for jobs once a timespan, and once more with every job that ended: in seconds,
# by the end of a long run, it takes an eighth of a core.
all: setup ## every table and figure on the demo study, and results/claims.md
	$(BIN)/snakemake --cores $(CORES) --max-jobs-per-timespan 1000/10s
	@echo && cat results/claims.md

plan: setup ## GPU-hours, disk, memory and access that the paper's own study takes
	PYTHONPATH=src $(BIN)/python -m flame.plan --study config/paper.yaml

report: all ## results/report.html: every table and figure, run times and the study, in one file
	$(BIN)/snakemake --report results/report.html

tiny: setup ## the whole way of the data at toy size, in results of its own
	$(BIN)/snakemake --cores $(CORES) --directory results/tiny --configfile tests/config/tiny.yaml

test: setup ## all tests
	$(BIN)/python -m pytest

test-faults: setup ## every stage killed KILLS times, and the whole workflow: docs/faults.md
	$(BIN)/python -m pytest tests/faults --kills $(KILLS)

test-slurm: setup ## the profile for clusters, on a SLURM of its own (Debian, root: apt-get installs it)
	bash tests/slurm/cluster.sh install
	$(BIN)/python -m pytest tests/slurm

.venv-conda/.ready: tests/conda/requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Python 3.11 is needed, as in environment.yml: make PYTHON=...")'
	$(PYTHON) -m venv .venv-conda
	.venv-conda/bin/python -m pip install --progress-bar off --requirement tests/conda/requirements.txt
	touch $@

test-conda: setup .venv-conda/.ready ## --use-conda on the tiny study, by a stand-in for conda; for a while 6.5 GB
	$(BIN)/python -m pytest -m conda tests/conda

lint: setup ## what CI checks besides tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/snakefmt --check workflow
	$(BIN)/mypy
	$(BIN)/snakemake --lint

format: setup ## put files into the project's form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/snakefmt workflow

bench: setup ## speed against the alternatives, as ratios
	$(BIN)/snakemake --cores $(CORES) resources/llms/smollm2-135m
	PYTHONPATH=src $(BIN)/python bench/embed.py resources/llms/smollm2-135m
	PYTHONPATH=src $(BIN)/python bench/store.py

storage: table6 ## what stores in 8 bits cost: their error, and recall of flame-7 trained on them
	PYTHONPATH=src $(BIN)/python bench/storage.py

docs: setup ## docs/datasets.md from the cards of the data sets
	PYTHONPATH=src $(BIN)/python -m flame.data.datasets >docs/datasets.md

# What vLLM 0.18.1 needs is taken from the days of its release, but for what our own packages need.
NEWER := pillow polars polars-runtime-32 pydantic pydantic-core requests tqdm typing-extensions typing-inspection tyro
AT_VLLM := --exclude-newer 2026-04-15 $(NEWER:%=--exclude-newer-package %=2099-01-01)

lock: setup ## requirements.lock from pyproject.toml, and from it the versions of both conda environments
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra slurm --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --output-file requirements.lock
	$(BIN)/python workflow/envs/pin.py environment.yml --universal --constraint $(CURDIR)/requirements.lock
	$(BIN)/python workflow/envs/pin.py workflow/envs/vllm.yml --python-platform x86_64-manylinux_2_31 --only-binary :all: $(AT_VLLM)

unlock: setup ## after a kill -9 or a power cut: let the next run go on where the last one was
	$(BIN)/snakemake --unlock

clean: ## results and logs; downloads and the environment stay
	rm -rf results logs
