# Two commands: `make demo` and `make test`. Each makes .venv when there is none.
# Some tests look at the pages in a browser, some with axe-core, which npm fetches; where there is none of these they
# are skipped, with a word: apt-get install chromium npm.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AXE := axe-core@4.14.1

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/batchnorm compare digits

test: lint $(VENV)/axe
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/axe: $(VENV)/installed
	@rm -rf $@.part && mkdir $@.part
	@if command -v npm >/dev/null; then \
	    npm pack --silent --pack-destination $@.part $(AXE) && tar -xzf $@.part/*.tgz -C $@.part && mv $@.part $@; \
	else echo "make test: without npm the tests that need axe-core are skipped"; fi

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -exec rm -rf {} +
