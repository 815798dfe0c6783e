"""Fixtures for all tests. Tests run on one thread: their tensors are small, and a second thread slows them down."""

from pathlib import Path

import pytest
import torch

from batchnorm.kernels.chosen import cpu_kernel

HERE = Path(__file__).parent
MARKED_FIXTURES = {"chromium": "browser", "on_ranks": "distributed"}
MARKED_FILES = {
    "compile": ["nn/test_compile.py", "nn/test_export.py"],
    "distributed": [
        "nn/test_sync.py",
        "nn/test_sync_exchange.py",
        "statistics/test_recalibrate_on_ranks.py",
        "test_scale_docs.py",
    ],
    "slow": [
        "kernels/test_fuzz.py",
        "kernels/test_native.py",
        "kernels/test_native_options.py",
        "lab/bench",
        "lab/claims/test_study.py",
        "lab/comparison/test_conduct.py",
        "lab/comparison/test_resume.py",
        "lab/estimators",
        "lab/report",
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
"""Files and folders whose tests get a mark, so that ``make test-quick`` leaves them out."""


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items):
    """Mark tests by the fixtures that they use, and by their files."""
    marks = {HERE / path: mark for mark, paths in MARKED_FILES.items() for path in paths}
    for item in items:
        for fixture in MARKED_FIXTURES.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(MARKED_FIXTURES[fixture])
        for path in (item.path, *item.path.parents):
            if path in marks:
                item.add_marker(marks[path])


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
def native_kernels():
    """Make sure that CPU tensors use the native kernels."""
    assert cpu_kernel() == "native"
