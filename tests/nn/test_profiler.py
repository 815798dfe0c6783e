"""The names that profilers and autograd's graph show: batch normalization is found under its own."""

import warnings

import pytest
from torch.profiler import ProfilerActivity, profile

import batchnorm as bn
from support import randn


def step(layer, x):
    y = layer(x)
    y.square().sum().backward()
    return y


def names_in_profile(layer, x):
    with warnings.catch_warnings(action="ignore"), profile(activities=[ProfilerActivity.CPU]) as recorded:
        step(layer, x)
    return {event.key for event in recorded.key_averages()}


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize("calls", [0, 3], ids=["first call", "planned call"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_profiler_shows_both_kernels_as_batchnorm(mode, calls):
    layer, x = bn.BatchNorm2d(3).train(mode), randn(4, 3, 5, 5).requires_grad_()
    for _ in range(calls):
        step(layer, x)
    assert {"batchnorm::forward", "batchnorm::backward", "BatchNormBackward"} <= names_in_profile(layer, x)


@pytest.mark.usefixtures("native_kernels")
def test_a_node_of_autograds_graph_is_named_batch_norm_backward():
    y = bn.BatchNorm1d(3)(randn(4, 3))
    assert y.grad_fn.name() == "BatchNormBackward"
