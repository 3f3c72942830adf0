# Each target first creates .venv, if it is missing or older than setup.cfg and constraints.txt.
CONFIG = launch/tiny.yaml
N = 2
ARGS =
KILLS = 20
FAKE_GPU_VENV = .venv-gpu
EXTRAS ?= dev
# The installation compiles no bytecode, so Python must store what it compiles at import: torch then starts in half the
# time.
export PYTHONDONTWRITEBYTECODE =

python = .venv/bin/python
installed = .venv/installed-$(EXTRAS)

.PHONY: help train test test-quick bench learn chaos gpu fake-gpu lint clean

help:
	@echo "make train        prepare a corpus, then train:  CONFIG=$(CONFIG) N=$(N) (processes) ARGS='section.key=value ...'"
	@echo "make test         run all tests:  ARGS='-k router' and other pytest options"
	@echo "make test-quick   run the tests that are not marked slow"
	@echo "make bench        measure speed as ratios, in one run of some minutes: a table, and bench.json"
	@echo "make learn        compare three runs (bias, no bias, dense) with the true floor: a table and a plot"
	@echo "make chaos        kill a run many times (KILLS=$(KILLS)) and compare it with one that is not killed: a table"
	@echo "make gpu          check a machine with a GPU (at most nine minutes): a verdict for each part; N=8: layouts on 8 GPUs"
	@echo "make fake-gpu     run and count on simulated GPUs (no GPU needed; 5 GB, an hour): ARGS='--part counts'"
	@echo "make lint         run ruff, import-linter and mypy"
	@echo "make clean        remove .venv, .venv-gpu and caches, but no runs and corpora"
	@echo "PYTHON=python3.12 chooses the Python of a new .venv (default: the newest of 3.11 to 3.14)"
	@echo "EXTRAS=$(EXTRAS) chooses the extras of setup.cfg to install: dev, hub, play (make test adds play)"

.venv/installed-%: setup.cfg constraints.txt
	@PYTHON="$(PYTHON)" sh launch/install.sh $*
	@touch $@

train: $(installed)
	@start=$$(date +%s); $(python) -m data.prepare --config $(CONFIG) $(ARGS) && \
	echo "prepare: $$(($$(date +%s) - start)) s"
	@exec $(python) -m launch.torchrun --nproc_per_node=$(N) -m trainer.main --config $(CONFIG) $(ARGS)

test: $(installed),play
	@$(python) -m pytest $(ARGS)

test-quick: $(installed)
	@$(python) -m pytest -m "not slow" $(ARGS)

bench: $(installed)
	@$(python) -m tests.bench $(ARGS)

learn: $(installed)
	@$(python) -m tests.learn $(ARGS)

chaos: $(installed)
	@$(python) -m tests.chaos --kills $(KILLS) $(ARGS)

# Installs nothing, because a machine that is rented for minutes has a Python with torch. .venv is used if its torch has
# CUDA.
gpu:
	@python=.venv/bin/python; \
	$$python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null || python="$(or $(PYTHON),python3)"; \
	exec "$$python" -m tests.gpu.check $(if $(filter file,$(origin N)),,--ranks $(N)) $(ARGS)

# A separate environment with the CUDA build of torch. FAKE_GPU_VENV names another environment that has it.
.venv-gpu/installed: setup.cfg constraints.txt tests/gpu/sim/install.sh
	@PYTHON="$(PYTHON)" sh tests/gpu/sim/install.sh .venv-gpu
	@touch $@

fake-gpu: $(if $(filter .venv-gpu,$(FAKE_GPU_VENV)),.venv-gpu/installed)
	@$(FAKE_GPU_VENV)/bin/python -B -m tests.gpu.sim $(ARGS)

lint: $(installed)
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(dir $(python))lint-imports --no-cache
	@$(python) -m mypy

clean:
	rm -rf .venv .venv-gpu .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find data model parallel trainer launch tests -name __pycache__ -exec rm -rf {} +
