# Everything runs from .venv, which `make install` builds; the other targets build it when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= runs/digits
STUDY ?= runs/study

.PHONY: install demo study cards docs notebooks format lint types test test-slow bench check clean

install: $(VENV)/.installed

# pip resolves in a second step because torch's CPU build is pinned first: constraints.txt says which.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 10) and "hf_ddpm needs Python >= 3.10, $(PYTHON) is " + v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/python train_scripts/demo.py --out $(DEMO)

study: install
	$(BIN)/python train_scripts/study/study.py --out $(STUDY) --page model_cards/study-digits

cards: install
	$(BIN)/python train_scripts/make_cards.py

# Strict: a link or an anchor that leads nowhere is an error. mkdocs is held below 2, and says so at length.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: install
	$(BIN)/python docs/notebooks/run.py

format: install
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: install
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/lint-imports

types: install
	$(BIN)/pyright

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

bench: install
	$(BIN)/python -m pytest -n 0 -m bench -s tests/benchmarks

check: lint types test

clean:
	rm -rf $(VENV) runs site .pytest_cache .ruff_cache .hypothesis
