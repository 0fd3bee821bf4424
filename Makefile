# Every target sets itself up in .venv and touches nothing outside this folder.
PYTHON ?= python3
export MPLCONFIGDIR := $(CURDIR)/.venv/cache/matplotlib
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q --cache-dir .venv/cache
SOURCES := setup.py pyproject.toml $(wildcard fastbn/_kernels/cython_cpu/*.py* fastbn/_kernels/cython_cpu/*.h)

.PHONY: demo test bench bench-smoke lint peers clean

demo: .venv/demo
	$(BIN)/python -m fastbn demo

test: .venv/test
	$(BIN)/python -m pytest

bench: .venv/peers
	$(BIN)/python -m pytest bench -q --benchmark-enable --benchmark-only --benchmark-json=.venv/bench.json
	$(BIN)/python bench/report.py .venv/bench.json

# Every benchmark once, with no timing: that they run.
bench-smoke: .venv/peers
	$(BIN)/python -m pytest bench -q --benchmark-disable

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch and the others that fastbn is held against: large, so only `make bench` and CI ask for them.
peers: .venv/peers

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(PIP) install 'pip>=25.1'

# The package itself, built in place; made anew when a kernel or the build changes.
.venv/fastbn: .venv/bin/python $(SOURCES)
	$(PIP) install -e .
	@touch $@

.venv/demo: .venv/fastbn
	$(PIP) install -e '.[demo]'
	@touch $@

.venv/test: .venv/fastbn
	$(PIP) install --group test
	@touch $@

.venv/lint: .venv/test
	$(PIP) install --group lint
	@touch $@

.venv/peers: .venv/test
	$(PIP) install --group peers
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info fastbn/_kernels/cython_cpu/*.c fastbn/_kernels/cython_cpu/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
