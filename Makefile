# Two commands: `make demo` and `make test`. Each makes .venv when there is none, and builds the CPU kernels in it.
# Some tests look at the pages in a browser, some with axe-core, which npm fetches; where there is none of these they
# are skipped, with a word: apt-get install chromium npm.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AXE := axe-core@4.14.1
KERNELS := $(wildcard src/batchnorm/kernels/native*.cpp src/batchnorm/kernels/native*.h)
SANITIZERS := -fsanitize=address,undefined

.PHONY: demo test lint bench sanitize clean

demo: $(VENV)/installed
	$(BIN)/batchnorm compare digits

# A file's tests stay together: they share what takes long to make.
test: lint $(VENV)/axe
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist loadfile

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/batchnorm bench --out benchmarks/results/kernels.json

# The kernels' tests on kernels that stop at the first access out of bounds and the first undefined operation; of an
# x86-64's instruction sets AVX2 alone, which spares two thirds of the wait. ASan must come first in the process; so must
# libstdc++, whose exceptions it watches and torch throws. Python's leaks aren't ours.
sanitize: $(VENV)/installed
	rm -rf build/sanitize
	CC=gcc CXX=g++ CPPFLAGS=$(if $(filter x86_64,$(shell uname -m)),-DBN_ONLY=256) \
	    CFLAGS='-g1 -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all $(SANITIZERS)' LDFLAGS='$(SANITIZERS)' \
	    $(BIN)/python setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize
	BATCHNORM_KERNELS=native BATCHNORM_NATIVE_LIBRARY=$(CURDIR)/build/sanitize/batchnorm/kernels/_native.so \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	    $(BIN)/python -m pytest tests/kernels --ignore tests/kernels/test_allocator.py  # malloc is ASan's there

# Where the kernels alone have changed they alone are built anew.
$(VENV)/installed: pyproject.toml constraints.txt setup.py $(KERNELS)
	$(if $(filter-out $(KERNELS),$?),$(INSTALL),$(BIN)/python setup.py -q build_ext --inplace)
	touch $@

define INSTALL
$(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
endef

$(VENV)/axe: $(VENV)/installed
	@rm -rf $@.part && mkdir $@.part
	@if command -v npm >/dev/null; then \
	    npm pack --silent --pack-destination $@.part $(AXE) && tar -xzf $@.part/*.tgz -C $@.part && mv $@.part $@; \
	else echo "make test: without npm the tests that need axe-core are skipped"; fi

clean:
	rm -rf $(VENV) build dist src/*.egg-info src/batchnorm/kernels/_native.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -exec rm -rf {} +
