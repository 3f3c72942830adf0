# Each target first makes .venv, if it is missing or older than setup.cfg and constraints.txt.
CONFIG = launch/tiny.yaml
N = 2
ARGS =
EXTRAS ?= dev
# Nothing is compiled at install, so what is imported must be kept: torch starts in half the time.
export PYTHONDONTWRITEBYTECODE =

python = .venv/bin/python
installed = .venv/installed-$(EXTRAS)

.PHONY: help train test test-quick bench lint clean

help:
	@echo "make train        data, then training:  CONFIG=$(CONFIG) N=$(N) (processes) ARGS='section.key=value ...'"
	@echo "make test         the whole test suite:  ARGS='-k router' and other pytest options"
	@echo "make test-quick   the tests that are not marked slow"
	@echo "make bench        speed as ratios, measured in one run (minutes): a table, and bench.json"
	@echo "make lint         ruff and mypy"
	@echo "make clean        remove .venv and caches; runs and corpora stay"
	@echo "PYTHON=python3.12 chooses the Python of a new .venv (default: the newest of 3.11 to 3.14)"
	@echo "EXTRAS=$(EXTRAS) chooses the extras of setup.cfg to install: dev, hub, play"

$(installed): setup.cfg constraints.txt
	@PYTHON="$(PYTHON)" sh launch/install.sh $(EXTRAS)
	@touch $@

# torchrun answers Ctrl-C with a traceback, and its workers, in sessions of their own, do not get it from the
# terminal. So torchrun runs in the background, where a shell lets it ignore Ctrl-C; the trap tells the workers,
# which save and end, and torchrun ends as after any run. LOGLEVEL leaves out its advice on OMP_NUM_THREADS.
train: $(installed)
	@start=$$(date +%s); $(python) -m data.prepare --config $(CONFIG) $(ARGS) && \
	echo "prepare: $$(($$(date +%s) - start)) s"
	@start=$$(date +%s); \
	LOGLEVEL=$${LOGLEVEL:-ERROR} $(python) -m torch.distributed.run --standalone --nproc_per_node=$(N) \
	    --signals-to-handle=SIGTERM,SIGHUP,SIGQUIT,SIGUSR1 -m trainer.main --config $(CONFIG) $(ARGS) & run=$$!; \
	workers() { cat /proc/$$run/task/*/children 2>/dev/null || pgrep -P $$run; }; \
	trap 'kill -INT $$(workers) 2>/dev/null || kill $$run' INT; \
	trap 'kill $$run' TERM; \
	while kill -0 $$run 2>/dev/null; do wait $$run; code=$$?; done; \
	echo "train: $$(($$(date +%s) - start)) s"; \
	exit $$code

test: $(installed)
	@$(python) -m pytest $(ARGS)

test-quick: $(installed)
	@$(python) -m pytest -m "not slow" $(ARGS)

bench: $(installed)
	@$(python) -m tests.bench $(ARGS)

lint: $(installed)
	@$(python) -m ruff check .
	@$(python) -m mypy

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find data model parallel trainer launch tests -name __pycache__ -exec rm -rf {} +
