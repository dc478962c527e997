# make demo: install and run the main job.   make test: install and run the whole gate.
# make slow: the long tests.   make lowest: the gate's tests on the lowest versions that pyproject.toml allows.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := gdro_jax experiments tests tpu

.PHONY: demo test slow lowest format lint types unit clean

demo: .venv/installed
	$(BIN)/gdro compare --config experiments/configs/demo.yaml

test: lint
	@$(MAKE) --no-print-directory -j2 types unit

lint: .venv/installed-dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

types: .venv/installed-dev
	$(BIN)/mypy

unit: .venv/installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

slow: .venv/installed-dev
	$(BIN)/python -m pytest -q -m slow

lowest: .venv-lowest/installed
	.venv-lowest/bin/python -m pytest -q -n 2 --dist loadfile

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

.venv-lowest/installed: pyproject.toml requirements-lowest.lock
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q --disable-pip-version-check -c requirements-lowest.lock -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .venv-lowest build *.egg-info
