# Each target sets up what it needs first. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
CORES ?= all
KILLS ?= 20
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Where it is set, every job would compile all of torch anew: half of its start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup table6 all plan report tiny test test-faults test-slurm test-conda lint format bench storage docs docs-results lock unlock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

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

RESULTS ?= results
MACHINE ?= $(or $(shell sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1),$(shell uname -m))
PAGE := docs/results/README.md
# Figures at 1400 pixels and 128 colours: well below 300 kB each.
SMALL := import sys; from pathlib import Path; from PIL import Image; \
	images = {Path(path).name: Image.open(path).convert("RGB") for path in sys.argv[1:]}; \
	[image.thumbnail((1400, 2800)) for image in images.values()]; \
	[image.quantize(128).save(Path("docs/results", name), optimize=True) for name, image in images.items()]
# $(call between,NAME,FILE): standard input, at least one line, replaces what FILE has between two marks.
between = awk 'FNR == NR {text = text $$0 "\n"; next} $$0 == "<!-- /$(1) -->" {skip = 0} !skip; \
	$$0 == "<!-- $(1) -->" {printf "%s", text; skip = 1}' - $(2) >$(2).new && mv $(2).new $(2)

docs-results: setup ## docs/results and the README's Table 6 and figures, from the results of make all
	cp $(filter-out %/README.md,$(wildcard $(RESULTS)/*.md)) docs/results
	$(BIN)/python -c '$(SMALL)' $(wildcard $(RESULTS)/*.png)
	echo "Computed on $$(date -u -r $(RESULTS)/claims.md +%F) on $$(getconf _NPROCESSORS_ONLN) cores of a machine with $(MACHINE)." \
		| $(call between,run,$(PAGE))
	cd docs/results && for page in claims.md table*.md appendix*.md; do \
		sed -n "1{s/[*#]//g;s/^ *//;s|.*|- [&]($$page)|;p;}" $$page; done | (cd ../.. && $(call between,tables,$(PAGE)))
	(echo; cd docs/results && for figure in *.png; do echo "![$${figure%.png}]($$figure)"; done) \
		| $(call between,figures,$(PAGE))
	(echo; test ! -f docs/results/figure4.png || echo '<img src="docs/results/figure4.png" width="49%" alt="Retrieval in 14 languages: CLIP and FLAME, trained on English captions">'; \
		test ! -f docs/results/figure6.png || echo '<img src="docs/results/figure6.png" width="49%" alt="FLAME trained with one to nine prompts, with 95 % intervals">') \
		| $(call between,figures,README.md)
	sed -n '/^| prompts/,/^$$/p' $(RESULTS)/table6.md \
		| sed -e 's/<br><sub>[^|]*<\/sub>//g' -e '/<sub>paper/d' -e '/^$$/d' | $(call between,table6,README.md)

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
	find results -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
	rm -rf logs
