# make demo   train a small RWKV-7 on real text and read what it writes (DEMO="..." passes arguments on)
# make test   lint, types and the whole test suite
# make sanitize   the tests of the native kernels under the address and undefined-behaviour sanitizers
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test sanitize lint format install docs clean

demo: $(VENV)/.train
	$(BIN)/wkv demo $(DEMO)

# One worker per core, and each file's tests in one of them: files share what is slow to set up.
test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.dev

# torch is installed first and alone, at the pinned version: resolved together with other packages it could be
# replaced by a build with gigabytes of CUDA libraries.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch numpy
	touch $@

NATIVE := $(wildcard native/CMakeLists.txt native/src/* native/kernels/*)

$(VENV)/.train: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(PIP) install --quiet -c constraints.txt -e ".[train]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.train

# cmake and ninja come with the build requirements where the system has none.
SANITIZED := build/sanitize
sanitize: $(VENV)/.dev
	$(PIP) install --quiet cmake ninja
	$(BIN)/cmake -S native -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DWKV_SANITIZE=ON
	$(BIN)/cmake --build $(SANITIZED)
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		$(BIN)/python -m pytest --native-library $(SANITIZED)/libwkv_native.so tests/ops tests/quantization/test_kernels.py \
		tests/inference/test_native_rwkv7.py tests/tokenizers/test_native_world.py -k "native or kernels"

docs: $(VENV)/.dev
	$(PIP) install --quiet -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
