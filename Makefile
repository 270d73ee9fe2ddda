# Everything a fresh machine needs: `make demo` and `make test` install what they use into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH := .venv-bench
BENCH_STAMP := $(BENCH)/.installed
WORKERS ?= 2
WHOLE := tests/laws tests/acceptance tests/examples tests/surface/test_examples_in_docstrings.py \
	tests/unit/testing/test_support.py $(addprefix tests/unit/,algorithms benchmarks circuits cli engine studies \
	subspaces sweeps tuning validation)
UNCHECKED := -q --import-mode=importlib --strict-markers --disable-socket --allow-unix-socket -p no:cacheprovider

.PHONY: demo test test-slow lint bench scaling tuning mutants validity zoo docs support ground-truth ground-truth-models scores faults clean install

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/causalpatch demo --out demo-output

# Annotations are checked but where runs are made by the thousand: that takes thrice the time, and is for `make test-slow`.
test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(addprefix --ignore=,$(WHOLE))
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" -o addopts="$(UNCHECKED)" $(WHOLE)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m slow -o addopts="$(UNCHECKED)"
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(WHOLE)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Peers come one by one and move none of our own packages; one that does not install is skipped and said to be.
$(BENCH_STAMP): pyproject.toml constraints.txt benchmarks/peers.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	$(BENCH)/bin/python -m pip freeze --exclude-editable > $(BENCH)/ours.txt
	grep -v '^#' benchmarks/peers.txt | while read -r peer; do \
		$(BENCH)/bin/python -m pip install --quiet --constraint $(BENCH)/ours.txt "$$peer" || echo "skipped: $$peer"; \
	done
	touch $@

# make bench BENCH_ARGS="--quick"; python -m benchmarks.run --help says what else there is.
bench: $(BENCH_STAMP)
	$(BENCH)/bin/python -m benchmarks.run $(BENCH_ARGS)

# All arms on all faults, those that stand in tuning.json left out. make tuning TUNING_ARGS="--only trigger"; --jobs 2.
tuning: $(STAMP)
	$(BIN)/python -m benchmarks.tuning $(TUNING_ARGS)

mutants: $(STAMP)
	$(BIN)/python -m benchmarks.mutants

# 4,000 simulated studies in each of 30 cells: ten minutes on one core.
validity: $(STAMP)
	$(BIN)/python -m benchmarks.validity

# One and two workers of Ray on this machine, which should do nothing else; a thousand that are simulated.
scaling: $(STAMP)
	$(BIN)/python -m benchmarks.scaling $(SCALING_ARGS)

docs: $(STAMP)
	$(BIN)/python -m pdoc --docformat google --output-directory docs/build causalpatch

support: $(STAMP)
	$(BIN)/python -m causalpatch.testing.support docs/support.md

zoo: $(STAMP)
	$(BIN)/python -m causalpatch.models.zoo.train

# make ground-truth TRUTH_ARGS="--only reverse"; python -m benchmarks.ground_truth --help says what else there is.
ground-truth: $(STAMP)
	$(BIN)/python -m benchmarks.ground_truth $(TRUTH_ARGS)

ground-truth-models: $(STAMP)
	$(BIN)/python -m causalpatch.circuits.ground_truth.train

# Scores against exact effects; python -m benchmarks.scores --help says what else there is.
scores: $(STAMP)
	$(BIN)/python -m benchmarks.scores $(SCORES_ARGS)

# Faults planted in copies of the embedded model; python -m benchmarks.faults --help says what else there is.
faults: $(STAMP)
	$(BIN)/python -m benchmarks.faults $(FAULTS_ARGS)

clean:
	rm -rf $(VENV) $(BENCH) demo-output docs/build .mypy_cache .ruff_cache .hypothesis
