"""Fixtures for all tests. Tests run on one thread: their tensors are small, and a second thread slows them down."""

from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from batchnorm.kernels.chosen import cpu_kernel

HERE = Path(__file__).parent
MARKED_FIXTURES = {"chromium": "browser", "on_ranks": "distributed"}
MARKED_FILES = {
    "compile": ["nn/test_compile.py", "nn/test_export.py"],
    "distributed": [
        "nn/test_dtensor.py",
        "nn/test_sync*.py",
        "statistics/test_recalibrate_on_ranks.py",
        "test_scale_docs.py",
    ],
    "peers": ["peers/*"],
    "slow": [
        "kernels/test_fuzz.py",
        "kernels/test_native*.py",
        "lab/bench/*",
        "lab/claims/test_study.py",
        "lab/comparison/test_conduct.py",
        "lab/comparison/test_resume.py",
        "lab/estimators/*",
        "lab/report/*",
        "lab/serving/test_shift.py",
        "lab/test_notebook.py",
        "nn/test_properties.py",
        "statistics/test_interrupts.py",
        "test_accuracy_docs.py",
        "test_cli.py",
        "test_docs.py",
        "test_exports.py",
        "test_packaging.py",
        "test_statistics_docs.py",
        "test_torch_internals.py",
    ],
}
"""Patterns of the files whose tests get a mark, so that ``make test-quick`` leaves them out."""


THOROUGH = frozenset((HERE / "thorough.txt").read_text().splitlines())
"""The cases that `make test` leaves out."""


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items):
    """Mark tests by their fixtures, their names and their files."""
    for item in items:
        for mark in _marks(item):
            item.add_marker(mark)


def _marks(item):
    yield from (mark for fixture, mark in MARKED_FIXTURES.items() if fixture in getattr(item, "fixturenames", ()))
    if "compil" in item.name:
        yield "compile"
    if item.nodeid in THOROUGH:
        yield "thorough"
    if item.path.is_relative_to(HERE):
        path = item.path.relative_to(HERE).as_posix()
        yield from (mark for mark, patterns in MARKED_FILES.items() if any(fnmatch(path, each) for each in patterns))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def set_threads():
    """``set_threads(count)``: set torch's number of threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def filled_empties():
    """Let new memory hold NaN, or the greatest integer, so that values that are never written show."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def native_kernels():
    """Make sure that CPU tensors use the native kernels."""
    assert cpu_kernel() == "native"
