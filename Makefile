# Everything here works on a fresh machine: the environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint bench eval clean

$(READY): pyproject.toml scripts/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) bash scripts/setup.sh
	touch $(READY)

demo: $(READY)  ## ask a question about a long text, cold and warm, and see what happened
	$(BIN)/cake-hf demo

test: $(READY)  ## the whole test suite
	$(BIN)/pytest

lint: $(READY)  ## style, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## measure against the single methods, on this machine
	$(BIN)/cake-hf bench

eval: $(READY)  ## is every restored prompt exact? a quick run without the Hub
	$(BIN)/python -m eval.parity --config eval/quick.yaml --fresh

clean:
	rm -rf $(VENV) .demo
