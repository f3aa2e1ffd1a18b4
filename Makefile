# Needs Python 3.11 or newer and make. PYTHON=python3.13 chooses another one.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: up test fast bench lint clean

up: .venv/installed  ## database, schema, demo catalogue, door and a tour
	@$(BIN)/pgcredits up

# Each process of a run would otherwise compile all tests and all of glue/ anew, where the environment forbids caches.
test fast: export PYTHONDONTWRITEBYTECODE =

test: lint  ## make test ARGS="-k webhook -x"
	$(BIN)/pytest $(ARGS)

fast: .venv/installed  ## the part of the tests that takes less than two minutes
	$(BIN)/pytest --fast -q -n 2 $(ARGS)

bench: .venv/installed
	$(BIN)/python bench/run.py $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p pgcredits
	$(BIN)/mypy tests

clean:  ## everything that can be made again; the embedded database in .pgcredits/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pgcredits needs Python 3.11 or newer")'
	@echo "Making .venv (once; this downloads about 60 MB)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --disable-pip-version-check --editable '.[test]'
	@mkdir -p .venv/typing && ln -sfn ../../glue .venv/typing/pgcredits
	@touch $@
