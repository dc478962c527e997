# make demo: install and run the main job.   make test: install and run the whole gate.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := gdro_jax experiments tests tpu

.PHONY: demo test slow format lint types unit clean

demo: .venv/installed
	$(BIN)/gdro compare --config experiments/configs/demo.yaml

test: lint types unit

lint: .venv/installed-dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

types: .venv/installed-dev
	$(BIN)/mypy

unit: .venv/installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

slow: .venv/installed-dev
	$(BIN)/python -m pytest -q -m slow

format: .venv/installed-dev
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml requirements.lock | .venv/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements.lock -e .
	@touch $@

.venv/installed-dev: pyproject.toml requirements.lock | .venv/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@ .venv/installed

clean:
	rm -rf .venv build *.egg-info
