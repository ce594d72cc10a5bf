# make demo: the whole method on this machine. make check test: what a change must pass.
PYTHON ?= python3
BIN := .venv/bin

# Rendering without a screen: EGL, OpenGL and Mesa's software driver, by Debian's and Ubuntu's names.
GRAPHICS := libegl1 libgl1 libgl1-mesa-dri

export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: setup graphics demo test check bench clean

setup: graphics .venv/installed

# The CPU build of torch is asked for first: left to the resolver, several GB of CUDA come along.
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "GSA needs Python 3.11 or newer: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "torch==2.13.*"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[all]"
	@touch $@

# Installs what is missing where it may; elsewhere says what to install.
graphics:
	@command -v dpkg-query >/dev/null || exit 0; \
	missing=$$(for package in $(GRAPHICS); do \
	  dpkg-query --show --showformat='$${db:Status-Status}\n' $$package 2>/dev/null | grep -qx installed || echo $$package; \
	done); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends $$missing; \
	else \
	  echo "Rendering without a screen needs packages. Run: sudo apt-get install --no-install-recommends" $$missing; \
	fi

demo: setup
	$(BIN)/gsa doctor
	$(BIN)/gsa demo

test: setup
	OMP_NUM_THREADS=1 GOMP_SPINCOUNT=1000 MUJOCO_GL=$${MUJOCO_GL:-egl} $(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks --quick

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
