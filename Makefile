# make demo: install, then the whole pipeline on a real 135M model.   make test: install, then the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Spinning OpenMP threads take the cores that other processes need.
export OMP_WAIT_POLICY ?= passive

.PHONY: help install demo test lint format clean

help:
	@echo "make demo     install and run python -m align +experiment=demo (SFT, DPO, evaluation, leaderboard)"
	@echo "make test     install and run the tests"
	@echo "make lint     ruff and mypy"
	@echo "make format   ruff's fixes and formatting"
	@echo "make clean    remove outputs and caches, keep $(VENV)"

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	@echo "Installing the pinned dependencies into $(VENV) (about 2 minutes)"
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet $(shell grep '^torch==' requirements.lock)
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps -r requirements.lock
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $@

demo: install
	$(BIN)/python -m align +experiment=demo

test: install
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf outputs wandb build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
