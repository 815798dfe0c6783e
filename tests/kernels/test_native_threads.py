"""The native kernels with several threads and processes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import batchnorm as bn
from kernel_oracle import DTYPES, LARGE
from support import randn, with_layout

pytestmark = pytest.mark.usefixtures("native_kernels")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), LARGE, ids=str)
def test_the_number_of_threads_matters_to_no_more_than_rounding(shape, layout, dtype, set_threads):
    # Results differ only where threads divide the sums of a channel: by twice the t of `assert_matches_formula`, and by
    # the rounding of y.
    x = with_layout(randn(*shape, dtype=dtype), layout)
    results = []
    for count in (1, 2, 3):
        set_threads(count)
        results.append(bn.batch_norm(x, None, None, training=True))
    t = 2e-13 if dtype == torch.float64 else 2e-5
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=t + torch.finfo(dtype).eps, atol=t)


def test_set_num_threads_is_obeyed(set_threads):
    # The single channel is divided into as many parts as there are threads, and each division rounds differently.
    x = randn(1, 1, 300_007, dtype=torch.float32)
    found = {}
    for count in (1, 2, 3, 1, 2, 3):
        set_threads(count)
        mean, var = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        bn.batch_norm(x, mean, var, training=True, momentum=1.0)
        found.setdefault(count, set()).add((mean.item(), var.item()))
    assert [len(results) for results in found.values()] == [1, 1, 1]
    assert len(set.union(*found.values())) == 3


def test_four_python_threads_at_once_get_what_one_gets(set_threads):
    set_threads(2)
    batches = [randn(8, 16, 40, 41, seed=seed) for seed in range(4)]

    def step(x):
        x = x.detach().requires_grad_()
        y = bn.batch_norm(x, None, None, training=True, activation="leaky_relu")
        return y.detach(), torch.autograd.grad(y, x, x.detach().cos())[0]

    alone = [step(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(step, batches * 3))
    for (y, dx), (other_y, other_dx) in zip(alone * 3, together, strict=True):
        # A new Python thread may use another number of torch's threads, which changes rounding, as above.
        torch.testing.assert_close(other_y, y, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(other_dx, dx, rtol=2e-5, atol=2e-5)


class NormalizedBatches(Dataset):
    """Batches, normalized in the process that loads them."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return bn.batch_norm(randn(16, 16, 32, 32, seed=index), None, None, training=True)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python's own word on fork beside threads
def test_workers_forked_after_parallel_work_finish(set_threads):
    set_threads(2)
    batches = NormalizedBatches()
    here = [batches[index] for index in range(4)]
    loaded = list(DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60))
    for mine, theirs in zip(loaded, here, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)
