"""Fixtures for all tests. Tests run on one thread: their tensors are small, and a second thread slows them down."""

import pytest
import torch

from batchnorm.kernels.chosen import cpu_kernel


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
