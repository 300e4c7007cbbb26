# Everything here works on a fresh machine: the environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
OLDEST_VENV := .venv-oldest
TOGETHER := -n 2 --dist loadfile

.PHONY: demo test test-oldest lint bench eval docs notebooks clean

$(READY): pyproject.toml scripts/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) bash scripts/setup.sh
	touch $(READY)

$(OLDEST_VENV)/.ready: pyproject.toml scripts/setup.sh
	PYTHON=$(PYTHON) VENV=$(OLDEST_VENV) bash scripts/setup.sh --editable '.[dev]' "transformers==$(OLDEST)"
	touch $@

demo: $(READY)  ## ask a question about a long text, cold and warm, and see what happened
	$(BIN)/cake-hf demo

test: $(READY)  ## the whole test suite, in two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/pytest $(TOGETHER)

test-oldest: $(OLDEST_VENV)/.ready  ## the whole test suite with the oldest transformers that is supported
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/pytest $(TOGETHER)

lint: $(READY)  ## style, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## the whole grid on this machine; on two cores half an hour or more
	$(BIN)/cake-hf bench grid --out benchmarks/results/grid.json --plots benchmarks/plots

eval: $(READY)  ## is every restored prompt exact? a quick run without the Hub
	$(BIN)/python -m eval.parity --config eval/quick.yaml --fresh

docs: $(READY)  ## the documentation, in docs/_build/html; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

notebooks: $(READY)  ## run the notebooks of examples/, into build/notebooks; --write of the script renews those in examples/
	$(BIN)/python scripts/notebooks.py

clean:
	rm -rf $(VENV) $(OLDEST_VENV) .demo docs/_build build/notebooks
