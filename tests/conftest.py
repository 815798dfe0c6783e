"""Every test on one thread: the tensors are small, and waking a second thread for them costs more than it helps."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
