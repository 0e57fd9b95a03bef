# make demo: train HODL to restore photographs and compare it.  make test: the whole test suite.
# make mutations: which of many small faults in the source the tests notice (hours).
# They set up their own environment in .venv first; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV   := .venv
STAMP  := $(VENV)/.installed

.PHONY: demo test mutations check clean
demo: $(STAMP)
	$(VENV)/bin/odljax train denoise

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2

mutations: $(STAMP)
	$(VENV)/bin/python tests/mutations

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
