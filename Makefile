# Everything sets itself up: `make demo` and `make test` work alone in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench heads-table clean

$(VENV)/.demo: setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --quiet --editable '.[demo,test,dev]'
	touch $@

# The main job, on real weights: prune, recover, save, reload, compare.
demo: $(VENV)/.demo
	$(BIN)/python examples/prune_smollm2.py
	$(BIN)/python examples/prune_minilm.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

# What the hook costs, and how long pruning takes beside a trace and a peer.
bench: $(VENV)/.demo
	$(BIN)/pip install --quiet --editable '.[bench]'
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/prune.py

# The README's table of attention heads, from trying every mode of every class in it.
heads-table: $(VENV)/.demo
	$(BIN)/python benchmarks/head_modes.py --write

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
