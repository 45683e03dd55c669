# Two commands do everything: `make demo` builds and generates text, `make check` runs the whole test suite.
# Both set up a virtual environment in .venv by themselves; PYTHON chooses the interpreter for it (3.10 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard native/*.h native/*.cpp native/tests/*.h native/tests/*.cpp)
MODEL := models/tiny-moe-q4_k_m.gguf
DEMO_RAM := 90MiB

.PHONY: demo check lint format test native-test wheel clean

demo: $(VENV)/.installed
	$(BIN)/edgemoe run $(MODEL) --ram $(DEMO_RAM) --max-tokens 100 --temp 0.6 --seed 7 \
	    "What does the Python function os.path.join do?"

check: lint native-test test

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# The native core three times: plain, with ASan and UBSan, with TSan.
native-test: $(VENV)/.dev
	for sanitizer in "" address,undefined thread; do \
	    build=build/native-$${sanitizer:-plain}; \
	    $(BIN)/cmake -S native -B $$build -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	        -DEDGEMOE_SANITIZE=$$sanitizer \
	    && $(BIN)/cmake --build $$build && $(BIN)/ctest --test-dir $$build --output-on-failure || exit 1; \
	done

wheel: $(VENV)/.dev
	$(BIN)/pip wheel --no-deps -w dist .

clean:
	rm -rf build dist $(VENV)

$(VENV)/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "edgemoe needs Python 3.10 or newer; try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

# llama-cpp-python is compiled here, which takes about six minutes on two cores.
$(VENV)/.installed: $(VENV)/bin/pip pyproject.toml $(wildcard native/*.h native/*.cpp) native/CMakeLists.txt
	$(BIN)/pip install --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --group dev
	touch $@
