# make run    the router, with the shipped config.toml          make test   everything that CI does
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CONFIG ?= config.toml

.PHONY: run test lint format readme bench backends matrix agents screenshots clean

run: $(VENV)/installed
	$(BIN)/python router.py serve $(CONFIG)

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# README's table of keys, from the code
readme: $(VENV)/tested
	$(BIN)/python tests/readme.py

# the router against a mock upstream, beside a bare waitress + urllib3 proxy
bench: $(VENV)/installed
	$(BIN)/python tests/bench.py

# real telemetry backends for the tests: OpenTelemetry Collector, Jaeger, a recorder, nginx
backends:
	tests/backends/install.sh

# every client language x every provider language, through the official SDKs
matrix: $(VENV)/tested
	$(BIN)/python tests/matrix.py

# coding agents from the npm registry, one tool round trip each
agents: $(VENV)/tested
	$(BIN)/python tests/agents.py
	$(BIN)/python -m pytest -n 0 tests/test_agents.py

screenshots: $(VENV)/tested
	$(BIN)/python tests/screenshots.py

# The program itself stays in this folder; only what it needs is installed.
$(VENV)/installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
