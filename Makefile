# Everything here works on a fresh machine: each environment is made on first use, from a lock of all versions. On Linux without an
# NVIDIA GPU torch is its CPU build, from the index of PyTorch's own (scripts/cpu_torch.sh; `make test TORCH_CPU_INDEX=` asks no index).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := $(if $(wildcard $(READY)),$(VENV),.venv-demo)# what is there already, or only what the demo needs
TOGETHER := -n 2 --dist loadfile
CORE := tests/test_versions.py tests/test_transformers_contract.py tests/test_cake_cache.py tests/test_parity.py tests/test_modes.py \
	tests/test_families.py tests/test_carried.py tests/test_batches.py tests/test_handover.py tests/test_layers.py \
	tests/test_layer_kinds.py tests/test_vision.py tests/test_adapters.py tests/test_faults.py tests/test_gated.py \
	tests/test_readme.py tests/test_docs.py tests/test_demo.py tests/test_offload.py tests/test_late_saving.py tests/test_collected.py
# Most of what a version of transformers can break; `test-oldest` and `test-newest` run the rest, too.

.PHONY: demo test test-core test-oldest test-newest test-kvpress test-triton test-core-oldest test-core-newest lock versions lint bench eval docs notebooks clean

NATIVE := src/cake_hf/chunks/_native.so
SETUP := pyproject.toml scripts/setup.sh scripts/cpu_torch.sh

$(READY): requirements/locked.txt $(SETUP)
	PYTHON=$(PYTHON) TORCH=$(TORCH) bash scripts/setup.sh $(VENV) requirements/locked.txt
	touch $@

# The library of the codecs. Setting up an environment builds it, too; here it is built when its source has changed.
$(NATIVE): $(wildcard src/cake_hf/chunks/*.[ch] src/cake_hf/chunks/lossy/*.[ch]) scripts/build_native.py
	$(PYTHON) scripts/build_native.py

.venv-oldest/.ready: requirements/oldest.txt $(SETUP)
	PYTHON=$(PYTHON) bash scripts/setup.sh .venv-oldest requirements/oldest.txt
	touch $@

.venv-kvpress/.ready: requirements/kvpress.txt $(SETUP)
	@$(PYTHON) -c 'import sys; sys.exit("kvpress 0.5.5 needs Python 3.12 or older: make test-kvpress PYTHON=python3.12" if sys.version_info >= (3, 13) else 0)'
	PYTHON=$(PYTHON) bash scripts/setup.sh .venv-kvpress requirements/kvpress.txt
	touch $@

.PHONY: .venv-newest
.venv-newest:
	PYTHON=$(PYTHON) bash scripts/setup.sh .venv-newest --newest

.venv-demo/.ready: requirements/demo.txt $(SETUP)
	PYTHON=$(PYTHON) bash scripts/setup.sh .venv-demo requirements/demo.txt
	touch $@

demo: $(DEMO)/.ready  ## ask a question about a long text, cold and warm, and see what happened
	$(DEMO)/bin/python -m demo

test: $(READY) $(NATIVE)  ## the whole test suite, in two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/pytest $(TOGETHER)

test-core: $(READY) $(NATIVE)  ## what a version can break; `make test-core VENV=.venv-torch TORCH=2.7.1`, or with PYTHON=python3.13
	OMP_NUM_THREADS=1 $(BIN)/pytest $(TOGETHER) $(CORE)

test-oldest: .venv-oldest/.ready $(NATIVE)  ## the whole suite with the oldest transformers that is supported
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest $(TOGETHER)

test-newest: .venv-newest $(NATIVE)  ## the whole suite with the newest release of everything, and pre-releases of transformers
	OMP_NUM_THREADS=1 .venv-newest/bin/pytest $(TOGETHER)

test-core-oldest: .venv-oldest/.ready $(NATIVE)  ## with the oldest transformers, the tests that a version of it can break
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest $(TOGETHER) $(CORE)

test-core-newest: .venv-newest $(NATIVE)  ## the same with the newest of everything
	OMP_NUM_THREADS=1 .venv-newest/bin/pytest $(TOGETHER) $(CORE)

# Beside the environment of the tests, which has no Triton where torch is its CPU build: with it, torch would compile otherwise.
.venv-triton/.ready: $(READY) requirements/locked.txt
	$(BIN)/pip --disable-pip-version-check install --quiet --no-deps --upgrade --target .venv-triton \
		"$$(sed -n 's/^\(triton==[^ ;]*\).*/\1/p' requirements/locked.txt)"
	touch $@

test-triton: .venv-triton/.ready $(NATIVE)  ## the Triton kernels, by their interpreter on the CPU
	PYTHONPATH=.venv-triton TRITON_INTERPRET=1 CAKE_HF_REQUIRE_TRITON=1 OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_lossless_triton.py tests/test_device_decoding.py

test-kvpress: .venv-kvpress/.ready  ## kvpress beside us
	OMP_NUM_THREADS=1 CAKE_HF_REQUIRE_KVPRESS=1 .venv-kvpress/bin/pytest tests/test_kvpress.py

lock: ## pin the newest release of everything anew; run the suite afterwards
	PYTHON=$(PYTHON) bash scripts/lock.sh

lint: $(READY)  ## style, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) $(NATIVE)  ## the whole grid on this machine; on two cores half an hour or more
	$(BIN)/python -m benchmarks grid --out benchmarks/results/grid.json --plots benchmarks/plots

eval: $(READY)  ## is every restored prompt exact? a quick run without the Hub
	$(BIN)/python -m eval.parity --config eval/quick.yaml --fresh

docs: $(READY)  ## the documentation, in docs/_build/html; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

notebooks: $(READY)  ## run the notebooks of examples/, into build/notebooks; --write of the script renews those in examples/
	$(BIN)/python scripts/notebooks.py

versions: $(READY)  ## docs/versions.md: every family on a row of transformers versions; takes about ten minutes
	$(BIN)/python scripts/versions.py

clean:
	rm -rf $(NATIVE) $(VENV) .venv .venv-oldest .venv-newest .venv-kvpress .venv-triton .venv-demo .demo docs/_build build/notebooks
