# Two commands: `make demo` and `make test`. Each creates .venv if there is none, and builds the CPU kernels in it.
# Some tests look at pages in a browser, and some use axe-core, which npm downloads. Where either is missing they are
# skipped with a message: apt-get install chromium npm.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AXE := axe-core@4.14.1
KERNELS := $(wildcard src/batchnorm/kernels/native*.cpp src/batchnorm/kernels/native*.h)
SANITIZERS := -fsanitize=address,undefined

TORCH ?= 2.10.0
TORCH_VENV := .venv-torch-$(TORCH)
TORCH_TESTS := $(addprefix tests/,kernels ops nn statistics surgery $(addprefix test_,$(addsuffix .py,\
    checks errors exports functional normalize processes reports text torch_internals)))
QUICK := not (thorough or slow or browser or compile or distributed or peers)

.PHONY: demo test test-all test-quick test-torch coverage lint hooks bench sanitize clean

demo: $(VENV)/installed
	$(BIN)/batchnorm compare digits

# The tests of a file run in one process, because they share fixtures that take long to make.
test: lint $(VENV)/axe $(VENV)/peers
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist loadfile -m 'not thorough'

test-all: lint $(VENV)/axe $(VENV)/peers
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist loadfile

test-quick: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist loadfile -m '$(QUICK)'

coverage: $(VENV)/axe $(VENV)/peers
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist loadfile --cov --cov-report term:skip-covered

# The tests of the core, on another version of torch, in an environment of its own. torch 2.14 deprecates torch.jit.
test-torch: $(TORCH_VENV)/installed
	$(TORCH_VENV)/bin/python -m pytest -n auto --maxprocesses 2 --dist loadfile \
	    -W 'ignore:`torch.jit' $(wildcard $(TORCH_TESTS))

$(TORCH_VENV)/installed: pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(TORCH_VENV)
	sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(TORCH_VENV)/constraints.txt
	$(TORCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(TORCH_VENV)/constraints.txt -e '.[test]'
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/typos

# Run ruff, mypy and typos before each commit.
hooks: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pre-commit install

bench: $(VENV)/installed
	$(BIN)/batchnorm bench --out benchmarks/results/kernels.json

# The tests of the kernels, on kernels that stop at the first access out of bounds and the first undefined operation. On
# x86-64 only AVX2 is built, which takes a third of the time. ASan must be loaded first, and so must libstdc++, since ASan
# intercepts its exceptions and torch throws some. Leaks are not reported: they are Python's.
sanitize: $(VENV)/installed
	rm -rf build/sanitize
	CC=gcc CXX=g++ CPPFLAGS=$(if $(filter x86_64,$(shell uname -m)),-DBN_ONLY=256) \
	    CFLAGS='-g1 -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all $(SANITIZERS)' LDFLAGS='$(SANITIZERS)' \
	    $(BIN)/python setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize
	BATCHNORM_KERNELS=native BATCHNORM_NATIVE_LIBRARY=$(CURDIR)/build/sanitize/batchnorm/kernels/_native.so \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	    $(BIN)/python -m pytest tests/kernels --ignore tests/kernels/test_allocator.py  # it tests glibc's malloc, which ASan replaces

# If only the kernels have changed, only they are built again.
$(VENV)/installed: pyproject.toml constraints.txt setup.py $(KERNELS)
	$(if $(filter-out $(KERNELS),$?),$(INSTALL),$(BIN)/python setup.py -q build_ext --inplace)
	touch $@

define INSTALL
$(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
endef

# Libraries that build on torch, for the tests in tests/peers; the constraints keep torch as it is. The extra is read from
# pyproject.toml, because an installation of the package with it would build the kernels again.
$(VENV)/peers: $(VENV)/installed
	@$(BIN)/python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	    print(*extras['optional-dependencies']['peers'], sep='\n')" > $(VENV)/peers.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $(VENV)/peers.txt && \
	    touch $@ || \
	    echo "make test: the extra peers could not be installed, so the tests that need it are skipped"

$(VENV)/axe: $(VENV)/installed
	@rm -rf $@.part && mkdir $@.part
	@if command -v npm >/dev/null; then \
	    npm pack --silent --pack-destination $@.part $(AXE) && tar -xzf $@.part/*.tgz -C $@.part && mv $@.part $@; \
	else echo "make test: npm is missing, so the tests that need axe-core are skipped"; fi

clean:
	rm -rf $(VENV) .venv-torch-* build dist src/*.egg-info src/batchnorm/kernels/_native.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
	find src tests -name __pycache__ -type d -exec rm -rf {} +
