# Everything runs in .venv, which each target makes if it is not there. .ci/run runs most of them in turn.
#
#   make demo          trains a small Llama with AdamW and with GPA, and compares them
#   make test          runs the tests
#   make bench         runs the short form of every benchmark
#   make docs          builds the site in build/docs; a warning fails it
#   make notebooks     runs the notebooks, in a short form
#   make lint          checks style, types, and the form of the workflows and CITATION.cff
#   make build         builds the wheel and sdist twice, compares them, and tries each in an empty environment
#
#   make tables        checks that the tables and figures of the documentation are those of the results
#   make plans         compiles training steps for TPUs and NVIDIA GPUs that are not there
#   make test-oldest   runs the tests of the library on the oldest supported versions
#   make test-examples-oldest   the same for the examples
#   make test-prereleases   runs the tests on what will be released next
#   make audit         looks for known vulnerabilities in what is installed
#   make torch         installs PyTorch, and make fashion-mnist those images: some tests skip without
#   make clients       trains with GPA in libraries that others wrote, each in an environment of its own;
#                      ARGS="numpyro keras" those alone

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo test bench docs notebooks lint build tables plans test-oldest test-examples-oldest test-prereleases audit \
	torch fashion-mnist clients clean

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
	$(BIN)/python -m benchmarks.accelerator --quick
	$(BIN)/python -m benchmarks.report --check

docs: $(VENV)/docs
	rm -rf build/docs docs/notebooks
	$(BIN)/python -m sphinx --fail-on-warning --keep-going docs build/docs

notebooks: $(VENV)/notebooks
	$(BIN)/python -m notebooks.run $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

build: $(VENV)/dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python .ci/check_built.py dist
	for built in dist/*.whl dist/*.tar.gz; do \
		rm -rf $(VENV)-built && $(PYTHON) -m venv $(VENV)-built && \
		$(VENV)-built/bin/python -m pip install --quiet $$built && \
		$(VENV)-built/bin/python -I .ci/check_installed.py || exit 1; \
	done

tables: $(VENV)/bench
	$(BIN)/python -m benchmarks.report --check

# The plugins are taken without what they depend on: to compile takes no CUDA.
plans:
	test -x $(VENV)-plans/bin/python || $(PYTHON) -m venv $(VENV)-plans
	$(VENV)-plans/bin/python -m pip install --quiet --editable '.[examples,test]' 'jax[tpu]'
	version=$$($(VENV)-plans/bin/python -c 'import jax; print(jax.__version__)') && \
		$(VENV)-plans/bin/python -m pip install --quiet --no-deps \
		"jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version"
	$(VENV)-plans/bin/python -m pytest tests/examples/test_planning.py tests/library/test_costs.py \
		tests/benchmarks/test_accelerator.py::TestOnAnH100 $(ARGS)

test-oldest:
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint .ci/oldest.txt --editable '.[test]'
	$(VENV)-oldest/bin/python -m pytest -n 2 $(ARGS)

test-examples-oldest:
	test -x $(VENV)-examples/bin/python || $(PYTHON) -m venv $(VENV)-examples
	$(VENV)-examples/bin/python -m pip install --quiet --constraint .ci/oldest-examples.txt \
		--editable '.[bench,test]'
	$(VENV)-examples/bin/python -m pytest -n 2 $(ARGS)

test-prereleases:
	test -x $(VENV)-prereleases/bin/python || $(PYTHON) -m venv $(VENV)-prereleases
	$(VENV)-prereleases/bin/python -m pip install --quiet --editable '.[test]'
	$(VENV)-prereleases/bin/python -m pip install --quiet --upgrade --pre jax jaxlib optax flax
	$(VENV)-prereleases/bin/python -m pytest -n 2 $(ARGS)

audit: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --upgrade pip pip-audit
	$(BIN)/pip-audit --skip-editable $(ARGS)

# The CPU build of PyTorch, if there is one for this Python.
torch: $(VENV)/examples,test
	if $(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --dest $(VENV)/torch \
			'torch==2.13.0+cpu' 2>/dev/null; then \
		$(BIN)/python -m pip install --quiet $(VENV)/torch/torch-*.whl schedulefree && \
		$(BIN)/python -m pip install --quiet --editable '.[transformers]'; \
	else \
		echo "no CPU build of PyTorch for this Python here"; \
	fi

# As Debian ships it.
fashion-mnist:
	apt-get install --quiet --quiet --yes dataset-fashion-mnist >/dev/null 2>&1 || \
		echo "no package dataset-fashion-mnist here"

clients:
	$(PYTHON) clients/run.py $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-* dist

# One stamp for each extra; a newer pyproject.toml installs again.
$(VENV)/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
