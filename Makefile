# `make demo` and `make test` need only Python 3.11 or later; they make .venv and install into it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROOT ?= diffit-demo
INSTALLED := $(VENV)/.installed

.PHONY: demo test slow lint format docs clean help

help:
	@echo "make demo       the whole chain on real digits: encode, train, evaluate, compare"
	@echo "make test       lint and all tests but the slow ones"
	@echo "make slow       the slow tests: clusters, faults, S3"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff format the code"
	@echo "make docs       write docs/recipes.md and docs/commands.md from the code"
	@echo "make clean      remove what make demo wrote (ROOT=$(ROOT))"

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"diffit needs Python 3.11 or later, not %d.%d; run make PYTHON=python3.11" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[demo,dev]'
	@touch $@

# Each line continues what a killed run left and passes over what is finished.
demo: $(INSTALLED)
	$(BIN)/diffit data digits $(ROOT)/images/digits
	$(BIN)/diffit fit autoencoder demo --root $(ROOT)
	$(BIN)/diffit fit features demo --root $(ROOT)
	$(BIN)/diffit encode demo --root $(ROOT)
	$(BIN)/diffit train demo --root $(ROOT)
	$(BIN)/diffit evaluate demo --root $(ROOT) --step 0 --step newest
	$(BIN)/diffit compare --root $(ROOT) --html $(ROOT)/compare.html

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/python -m pytest

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(ROOT)
