# Each target first makes .venv, if need be, with everything in it (scripts/setup.sh). No root, GPU or model download.
#   make serve ARGS="--port 8001"     ARGS goes to `flashmla serve` or to pytest
#   make setup PYTHON=python3.12 ENGINE=cpu
#   make test ENGINE=sglang           SGLang has an environment of its own, .venv-sglang, and tests of its own

VENV := $(if $(filter sglang,$(ENGINE)),.venv-sglang,.venv)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGE_CODE := flashmla_backend integration buildtools examples benchmarks
PYTHON_CODE := $(PACKAGE_CODE) tests
CPP_CODE := $(shell find kernels -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
export PYTHON ENGINE

.PHONY: help setup serve doctor test lint format wheel clean

help: ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(READY) ## Make .venv: an engine for this machine, and this package

serve: $(READY) ## Serve the embedded default model over HTTP
	$(BIN)/flashmla serve $(ARGS)

doctor: $(READY) ## Say what is here and what is missing
	$(BIN)/flashmla doctor

ifeq ($(ENGINE),sglang)
test: $(READY) ## Lint, build the wheel, run all tests; with ENGINE=sglang those of SGLang only
	$(BIN)/python -m pytest --durations=10 tests/sglang $(ARGS)
else
test: lint wheel
	$(BIN)/python -m pytest --durations=10 $(ARGS)
endif

lint: $(READY) ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check $(PYTHON_CODE)
	$(BIN)/ruff format --check $(PYTHON_CODE)
	$(BIN)/mypy $(PACKAGE_CODE)
	$(BIN)/clang-format --dry-run -Werror $(CPP_CODE)

format: $(READY) ## Let ruff and clang-format rewrite the code
	$(BIN)/ruff check --fix $(PYTHON_CODE)
	$(BIN)/ruff format $(PYTHON_CODE)
	$(BIN)/clang-format -i $(CPP_CODE)

wheel: $(READY) ## Build dist/*.whl and check what is in it
	rm -rf dist
	$(BIN)/pip wheel --no-deps --wheel-dir dist .
	$(BIN)/python buildtools/check_wheel.py dist/*.whl

clean: ## Remove what was built, .venv included
	rm -rf .venv .venv-sglang build dist

# The kernels are compiled at installation, so a change in them installs anew; Python is used in place.
$(READY): scripts/setup.sh $(wildcard scripts/*.txt) pyproject.toml $(shell find kernels buildtools -type f -not -name '*.pyc')
	scripts/setup.sh
	touch $@
