# Needs Python 3.11 or newer and make, nothing else. `make demo` runs the main job, `make test` every check.
#   make demo ARGS="--max_train_steps 5"     any flag of train_rlr_lora.py
#   make test PYTEST_ARGS="-k config"        any option of pytest
#   make venv PYTHON=python3.12              another interpreter

PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)

.PHONY: demo test lint docs format venv clean

demo: $(INSTALLED)
	$(BIN)/accelerate launch --config_file configs/accelerate/one_process.yaml --num_cpu_threads_per_process $(CORES) \
		train_rlr_lora.py --config configs/tiny_shapes.yaml $(ARGS)

# One worker a core, whole files at a time: fixtures of a file are built once. tests/conftest.py has their order.
# Tests need no network: a request to the Hub is an error, not a wait.
test: export HF_HUB_OFFLINE = 1
test: lint
	$(BIN)/python -m pytest --numprocesses $(CORES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory docs

# The site in outputs/site; a broken link is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build # with --quiet it would not count its warnings, and pass

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(INSTALLED)

# The stamp is newer than both files once everything is installed, so a second call installs nothing.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Python 3.11 or newer is needed, this is %s: make venv PYTHON=python3.x" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
