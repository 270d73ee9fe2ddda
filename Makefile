# Everything a fresh machine needs: `make demo` and `make test` install what they use into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.PHONY: demo test test-slow lint bench mutants zoo docs clean install

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/causalpatch demo --out demo-output

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

mutants: $(STAMP)
	$(BIN)/python -m benchmarks.mutants

docs: $(STAMP)
	$(BIN)/python -m pdoc --docformat google --output-directory docs/build causalpatch

zoo: $(STAMP)
	$(BIN)/python -m causalpatch.models.zoo.train

clean:
	rm -rf $(VENV) demo-output docs/build .mypy_cache .ruff_cache .hypothesis
