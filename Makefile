# Everything runs in .venv, which each target makes if it is not there.
#
#   make demo    trains a small Llama with AdamW and with GPA, and compares them
#   make test    runs the tests
#   make bench   runs the short form of every benchmark
#   make lint    checks style and types
#   make build   builds the wheel and sdist, and tries each in an empty environment

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo test bench lint build clean

demo: $(VENV)/examples
	$(BIN)/python -m examples.compare llama $(ARGS)

test: $(VENV)/examples,test
	$(BIN)/python -m pytest -n 2 $(ARGS)

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks.steps_to_target --quick
	$(BIN)/python -m benchmarks.convex --quick
	$(BIN)/python -m benchmarks.long_runs --quick
	$(BIN)/python -m benchmarks.update_cost --quick
	$(BIN)/python -m benchmarks.compiled_cost --quick
	$(BIN)/python -m benchmarks.train_step --quick
	$(BIN)/python -m benchmarks.report --check

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

build: $(VENV)/dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	for built in dist/*.whl dist/*.tar.gz; do \
		rm -rf $(VENV)-built && $(PYTHON) -m venv $(VENV)-built && \
		$(VENV)-built/bin/python -m pip install --quiet $$built && \
		$(VENV)-built/bin/python -I .ci/check_installed.py || exit 1; \
	done

clean:
	rm -rf $(VENV) $(VENV)-built dist

# One stamp for each extra; a newer pyproject.toml installs again.
$(VENV)/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
