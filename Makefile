# Every target sets up the environment that it needs. PYTHON is the interpreter to make it with.
PYTHON ?= python3
CORES ?= all
WORKERS ?= 2
KILLS ?= 20
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Without bytecode every job would compile torch again, which is half of its start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup table6 all plan report tiny test test-faults test-slurm test-conda lint format bench bench-gpu storage docs docs-results lock unlock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

$(BIN)/.ready: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile --progress-bar off --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation --no-index --editable .
	touch $@

setup: $(BIN)/.ready ## create .venv from requirements.lock, with this checkout installed editable

table6: setup ## results/table6.csv and .md of the demo study, or of STUDY=<a study's YAML>
	$(BIN)/snakemake --cores $(CORES) results/table6.csv $(STUDY:%=--configfile %)
	@echo && $(BIN)/python -m flame.table show results/table6.csv

# Snakemake looks for ready jobs once per timespan and after every job. With the default of one
# second, that takes an eighth of a core towards the end of a long run.
all: setup ## every table and figure of the demo study, and results/claims.md
	$(BIN)/snakemake --cores $(CORES) --max-jobs-per-timespan 1000/10s
	@echo && $(BIN)/python -m flame.table show results/claims.csv --columns claim "measured in" paper value low high verdict

plan: setup ## GPU hours, disk, memory and access that the paper study needs, or STUDY=<a study's YAML>
	$(BIN)/python -m flame.plan --study $(or $(STUDY),config/paper.yaml)

report: all ## results/report.html: tables, figures, run times and settings in one file
	$(BIN)/snakemake --report results/report.html

tiny: setup ## the tiny study, from download to table, in results/tiny
	$(BIN)/snakemake --cores $(CORES) --directory results/tiny --configfile tests/config/tiny.yaml

test: setup ## all tests, in WORKERS processes
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder

test-faults: setup ## kill every stage KILLS times, and the whole workflow (docs/faults.md)
	$(BIN)/python -m pytest tests/faults --kills $(KILLS)

test-slurm: setup ## the SLURM profile, on a cluster of this machine (Debian, root: uses apt-get)
	bash tests/slurm/cluster.sh install
	$(BIN)/python -m pytest tests/slurm

.venv-conda/.ready: tests/conda/requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Python 3.11 is needed, as in environment.yml: make PYTHON=...")'
	$(PYTHON) -m venv .venv-conda
	.venv-conda/bin/python -m pip install --progress-bar off --requirement tests/conda/requirements.txt
	touch $@

test-conda: setup .venv-conda/.ready ## --use-conda on the tiny study, with a stand-in for conda; needs 6.5 GB
	$(BIN)/python -m pytest -m conda tests/conda

lint: setup ## lint, format and type checks
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/snakefmt --check workflow
	$(BIN)/mypy
	$(BIN)/snakemake --lint

format: setup ## format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/snakefmt workflow

bench: setup ## benchmarks against the alternatives, as ratios
	$(BIN)/snakemake --cores $(CORES) resources/llms/smollm2-135m
	$(BIN)/python bench/embed.py resources/llms/smollm2-135m
	$(BIN)/python bench/store.py

bench-gpu: setup ## the paper's shapes on this machine's GPU, in ten minutes (docs/gpu.md)
	$(BIN)/python bench/gpu.py

storage: table6 ## error of 8-bit stores, and recall of flame-7 trained on them
	$(BIN)/python bench/storage.py

docs: setup ## docs/datasets.md from the data set cards, the estimate in docs/paper-study.md from flame.plan
	$(BIN)/python -m flame.data.datasets >docs/datasets.md
	$(BIN)/python docs/estimate.py

docs-results: setup ## docs/results and the README's Table 6 and figures, from the results of make all
	$(BIN)/python docs/results/collect.py results

# Dependencies of vLLM 0.18.1 are those of its release date, except for packages we pin ourselves.
NEWER := filelock google-crc32c ijson pillow polars polars-runtime-32 pydantic pydantic-core requests tqdm typing-extensions typing-inspection tyro
AT_VLLM := --exclude-newer 2026-04-15 $(NEWER:%=--exclude-newer-package %=2099-01-01)

lock: setup ## requirements.lock from pyproject.toml, and the pins of both conda environments
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra slurm --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --output-file requirements.lock
	$(BIN)/python workflow/envs/pin.py environment.yml --universal --constraint $(CURDIR)/requirements.lock
	$(BIN)/python workflow/envs/pin.py workflow/envs/vllm.yml --python-platform x86_64-manylinux_2_31 --only-binary :all: $(AT_VLLM)

unlock: setup ## unlock the working directory after a kill -9 or a power cut
	$(BIN)/snakemake --unlock

clean: ## remove results and logs; keep downloads and the environment
	find results -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
	rm -rf logs
