# Needs Python 3.11 to 3.13 and make. Everything is installed in .venv, nothing else
# is touched; `make demo` and `make test` need no step before them.

# The first interpreter that TensorFlow has wheels for; override with PYTHON=...
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	2>/dev/null && echo $$p && break; done)

BIN := .venv/bin
READY := .venv/.ready
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: help demo test test-ci test-jax test-nightly fuzz slow bench lint format types docs check-docs wheel clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The tests write Keras 2 files with tf-keras, which asks for `tensorflow` beside
# `tensorflow-cpu`: the same files twice.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.13 is needed: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[tensorflow-cpu,jax,plots,dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps tf-keras
	@touch $@

demo: $(READY)  ## train, rewrite with every fit, print what was kept
	$(BIN)/python examples/demo.py

test: $(READY)  ## the tests, on TensorFlow
	$(PYTEST)

test-ci: $(READY)  ## those of many seconds each, which CI runs as well
	$(PYTEST) -m "ci and not slow"

# Compiling every operation of every shape makes JAX slow to test; these are what
# differs between backends. `make test-jax JAX_TESTS=tests` runs everything.
JAX_TESTS ?= $(addprefix tests/test_, \
	rewriters.py methods.py formats.py accelerators.py per_example.py)

test-jax: $(READY)  ## the tests that depend on the backend, on JAX
	KERAS_BACKEND=jax $(PYTEST) -m "not slow" $(JAX_TESTS)

# Keras of tomorrow, laid before the installed one: do the private parts still exist?
test-nightly: $(READY)  ## the private parts and the zoo, on Keras's nightly build
	rm -rf build/nightly
	$(BIN)/python -m pip install --quiet --no-deps --pre --target build/nightly keras-nightly
	PYTHONPATH=build/nightly $(PYTEST) tests/test_private.py tests/test_rewriters.py

FUZZ ?= --minutes 5
fuzz: $(READY)  ## load changed files by the thousand: make fuzz FUZZ="--inputs 10000"
	$(BIN)/python tests/fuzz/fuzz.py --keep build/fuzz $(FUZZ)

slow: $(READY)  ## the tests marked slow
	$(PYTEST) -m slow

bench: $(READY)  ## timings and fidelity; the numbers of the README
	for f in $(filter-out %/common.py,$(wildcard tests/benchmarks/*.py)); do $(BIN)/python $$f || exit 1; done

lint: $(READY)  ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)  ## the type checker
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(READY)  ## write the generated pages
	$(BIN)/python docs/generate.py

check-docs: $(READY)  ## are the generated pages current?
	$(BIN)/python docs/generate.py --check

wheel: $(READY)  ## build the wheel, install it alone, run it
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps -w build/wheel .
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel/site build/wheel/*.whl
	cd build/wheel && PYTHONPATH=site ../../$(BIN)/python -P -m kerasnorm methods

clean:  ## remove what these commands made
	rm -rf .venv build dist *.egg-info
