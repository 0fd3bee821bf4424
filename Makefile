# Every target sets itself up in .venv and touches nothing outside this folder.
PYTHON ?= python3
export PIP_CACHE_DIR := $(CURDIR)/.venv/cache/pip
export MPLCONFIGDIR := $(CURDIR)/.venv/cache/matplotlib
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
KERNELS := fastbn/_kernels/cython_cpu
SOURCES := setup.py pyproject.toml $(wildcard $(KERNELS)/*.pyx $(KERNELS)/*.pxi $(KERNELS)/*.h)

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

.venv/pip:
	$(PYTHON) -m venv .venv
	$(PIP) install 'pip>=25.1'
	@touch $@

# The package itself, built in place; made anew when a kernel or the build changes.
.venv/fastbn: .venv/pip $(SOURCES)
	$(PIP) install -e .
	@touch $@

.venv/demo: .venv/fastbn
	$(PIP) install --group demo
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
	rm -rf .venv build dist *.egg-info $(KERNELS)/*.c $(KERNELS)/*.so fastbn-demo.png
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
