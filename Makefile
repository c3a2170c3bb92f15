# Two commands do everything on a fresh machine: `make reports`, then open reports/index.html; `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PROFILE ?= quick

.PHONY: help reports full test lab lint clean

help:  ## what there is to make
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(VENV)/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv  # a fifth of pip's time; where it cannot, pip does it
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[dev]' || $(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

reports: $(VENV)/ready  ## regenerate every report (PROFILE=quick, full or smoke) and the index over them
	$(BIN)/workbench report --profile $(PROFILE)

full: $(VENV)/ready  ## the full profile: hours, in parts that go on where they stopped
	$(BIN)/workbench report --profile full

test: $(VENV)/ready  ## the tests; they run every notebook in the smoke profile
	$(BIN)/python -m pytest --numprocesses logical --dist worksteal

lab: $(VENV)/ready  ## JupyterLab on this machine only, with its token
	$(BIN)/jupyter lab --ip=127.0.0.1 notebooks

lint: $(VENV)/ready  ## ruff, types, and notebooks without outputs
	$(BIN)/ruff check .
	$(BIN)/mypy workbench
	$(BIN)/nbstripout --verify notebooks/*.ipynb

clean:  ## remove the environment and the generated reports; reports/full stays
	rm -rf $(VENV) reports/[0-9]* reports/committed reports/reference reports/smoke reports/lab reports/.[a-z]* reports/index.html reports/summary.json
