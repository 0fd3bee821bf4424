# Every target sets itself up in .venv and touches nothing outside this folder.
PYTHON ?= python3
export PIP_CACHE_DIR := $(CURDIR)/.venv/cache/pip
export MPLCONFIGDIR := $(CURDIR)/.venv/cache/matplotlib
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
KERNELS := fastbn/_kernels/cython_cpu
SOURCES := setup.py pyproject.toml fastbn/_kernels/memory.pyx $(wildcard $(KERNELS)/*.pyx $(KERNELS)/*.pxi $(KERNELS)/*.h)

.PHONY: demo test sanitize ptx experiments experiments-quick bench bench-save bench-compare bench-smoke lint peers clean

demo: .venv/demo
	$(BIN)/python -m fastbn demo

# In two processes at once: what Numba compiles, once for all tests of it, and the rest.
test: .venv/test
	@$(BIN)/python -m pytest -p no:cacheprovider -k numba >.venv/numba.log 2>&1 & numba=$$!; trap 'kill $$numba' INT TERM; \
	$(BIN)/python -m pytest -k 'not numba'; others=$$?; \
	wait $$numba; numba=$$?; cat .venv/numba.log; exit $$((others | numba))

# Memory errors and undefined behaviour in the kernels: all tests on a build with sanitizers, some under valgrind.
sanitize: .venv/test
	.ci/sanitize

# The GPU's kernels compiled to PTX, looked at and interpreted. No GPU is needed, but numba-cuda and NVIDIA's compiler are:
# an environment of their own, .venv/ptx. There nothing is passed over: what would be skipped fails.
ptx: export FASTBN_TEST_PTX := 1
ptx: .venv/ptx/done
	.venv/ptx/bin/python -m pytest -q -o addopts=-ra -p no:cacheprovider tests/test_cuda.py -k compil

# The literature's claims, tried: every table of docs/experiments.md and its picture, made anew. Quick: that each still finds the same.
EXPERIMENTS := $(filter-out examples/_%.py examples/train_digits.py,$(wildcard examples/*.py))
experiments: .venv/demo
	set -e; for script in $(EXPERIMENTS); do echo "== $$script"; $(BIN)/python $$script; done

experiments-quick: .venv/demo
	set -e; for script in $(EXPERIMENTS); do echo "== $$script"; $(BIN)/python $$script --quick; done

bench: .venv/peers
	$(BIN)/python -m pytest bench -q --benchmark-enable --benchmark-only --benchmark-json=.venv/bench.json
	$(BIN)/python bench/report.py .venv/bench.json

# To hold a change against a run before it, without the peers: CONTRIBUTING.md. BENCH: which benchmarks.
BENCH ?= bench
NAME ?= before
OURS := $(BIN)/python -m pytest $(BENCH) -q --benchmark-enable --benchmark-only --no-peers \
	--benchmark-sort=name --benchmark-columns=min,median

bench-save: .venv/test
	$(OURS) --benchmark-save=$(NAME)

bench-compare: .venv/test
	$(OURS) --benchmark-group-by=fullname --benchmark-compare='*_$(NAME)'

# Every benchmark once, on small batches and with no timing: that they run, and that the peers compute the same.
# No library's threads spin there where the next one's want to run.
bench-smoke: export OMP_WAIT_POLICY := passive
bench-smoke: .venv/peers
	$(BIN)/python -m pytest bench -q --benchmark-disable

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch, jax and the others that fastbn is held against: large, so only `make bench` and CI ask for them.
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

.venv/ptx/done: pyproject.toml
	$(PYTHON) -m venv .venv/ptx
	.venv/ptx/bin/python -m pip --disable-pip-version-check -q install 'numba-cuda[cu12]>=0.30' 'pytest>=8' 'hypothesis>=6.100' 'ml_dtypes>=0.5'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info fastbn/_kernels/*.c fastbn/_kernels/*.so $(KERNELS)/*.c $(KERNELS)/*.so fastbn-demo.png
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
