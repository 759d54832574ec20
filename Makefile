# `make demo` and `make test` need nothing but Python 3.11 or newer: they make .venv and install into it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint format bench cards docs clean newcomer

.venv/installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python " + sys.version.split()[0] + " found, but constraints.txt needs 3.11 or newer. Use: make PYTHON=python3.11 (or newer). Python 3.10 works with constraints-oldest.txt.")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[train,test,dev]'
	touch $@

# Pretrains a small LION-S on documentation text, trains a small LION-D on digits, draws their decays: about 4 minutes.
demo: .venv/installed
	$(BIN)/python examples/demo.py --output_dir outputs/demo

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m 'not slow'

test-slow: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m slow

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/installed
	$(BIN)/python benchmarks/bench_ops.py
	$(BIN)/python benchmarks/bench_models.py
	$(BIN)/python benchmarks/bench_packing.py
	$(BIN)/python benchmarks/bench_masked_loss.py
	$(BIN)/python benchmarks/bench_modern.py

# One card per preset; `python model_cards/generate.py --check` lists those that are out of date.
cards: .venv/installed
	$(BIN)/python model_cards/generate.py

# The pages and the API as one site that works without a network: open build/docs/index.html
docs: .venv/installed
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html -c docs -d build/doctrees . build/docs

clean:
	rm -rf .venv build dist outputs .pytest_cache .ruff_cache .hypothesis src/*.egg-info

# The newcomer's trial: the commands of docs/contributing/newcomer.md and of the README, in a bare environment.
newcomer:
	$(PYTHON) docs/contributing/newcomer.py
