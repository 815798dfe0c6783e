"""The native kernels update running statistics, of every dtype and layout."""

import pytest
import torch

import batchnorm as bn
from batchnorm import ops
from batchnorm.kernels.records import Operands, Rule, Running
from kernel_oracle import DTYPES
from support import randn

pytestmark = pytest.mark.usefixtures("native_kernels")


@pytest.mark.parametrize("kept", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, None])
def test_every_batch_updates_the_running_statistics_and_the_count(momentum, kept):
    mean, var, batches = torch.zeros(3, dtype=kept), torch.ones(3, dtype=kept), torch.tensor(0)
    exact_mean, exact_var = mean.double().clone(), var.double().clone()
    for step in range(1, 4):
        x = randn(17, 3, 5, seed=step) + step
        ops.batch_norm(Operands(x), Running(mean, var, batches, momentum), Rule(1e-5, None, True))
        share = 1 / step if momentum is None else momentum
        exact_mean = exact_mean + share * (x.double().mean((0, 2)) - exact_mean)
        exact_var = exact_var + share * (x.double().var((0, 2)) - exact_var)
    assert batches == 3
    # Each of 3 steps rounds once to the dtype of the statistics; the batch's are accurate to 1e-5.
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1.5 * torch.finfo(kept).eps + 1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), exact_var, rtol=1.5 * torch.finfo(kept).eps + 1e-5, atol=1e-5)


@pytest.mark.parametrize("given", ["mean", "var"])
@pytest.mark.parametrize("kept", [torch.float32, torch.float64], ids=str)
def test_one_of_the_running_statistics_may_be_absent(given, kept):
    x = randn(17, 3)
    mean = torch.zeros(3, dtype=kept) if given == "mean" else None
    var = torch.zeros(3, dtype=kept) if given == "var" else None
    ops.batch_norm(Operands(x), Running(mean, var, None, 1.0), Rule(1e-5, None, True))
    found, expected = (mean, x.double().mean(0)) if var is None else (var, x.double().var(0))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_running_statistics_may_be_of_two_dtypes():
    x, mean, var = randn(17, 3), torch.zeros(3), torch.zeros(3, dtype=torch.float64)
    bn.batch_norm(x, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(var, x.double().var(0), rtol=1e-5, atol=0)
    y = bn.batch_norm(x, mean, var)
    torch.testing.assert_close(y.double(), (x - mean).double() / torch.sqrt(var + 1e-5), rtol=1e-5, atol=1e-5)


def test_the_running_statistics_may_be_strided():
    x, statistics = randn(17, 3), torch.full((3, 2), 7.0)
    bn.batch_norm(x, statistics[:, 0], torch.zeros(3), training=True, momentum=1.0)
    torch.testing.assert_close(statistics[:, 0], x.mean(0), rtol=1e-5, atol=1e-6)
    assert (statistics[:, 1] == 7).all()


def test_eval_updates_nothing():
    mean, var, batches = torch.zeros(3), torch.ones(3), torch.tensor(0)
    ops.batch_norm(Operands(randn(17, 3)), Running(mean, var, batches, 0.5), Rule(1e-5, None, False))
    assert not mean.any()
    assert (var == 1).all()
    assert batches == 0
