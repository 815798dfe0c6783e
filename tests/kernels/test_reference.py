"""The native kernels and the reference, against float64 and against autograd of the formula."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import batchnorm as bn
from batchnorm import ops
from batchnorm.kernels import library, reference
from batchnorm.kernels.records import Operands, Rule
from support import randn

ACTIVATIONS = [None, *reference.ACTIVATIONS]
SHAPES = [(2, 1), (7, 5), (4, 3, 1), (3, 5, 11), (5, 3, 2, 2), (1, 3, 5, 5), (2, 123, 3), (2, 2, 3, 1, 2)]
MASKS = {
    "no mask": None,
    "rows": torch.tensor([True, False, True, True]).view(4, 1, 1),
    "positions": torch.tensor([[True, True], [False, True], [True, False]]).view(1, 3, 2),
    "both": torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(0)) > 0.4,
}


def randn64(*shape, seed=0):
    """Draw standard normal values of float64."""
    return randn(*shape, seed=seed, dtype=torch.float64)


@pytest.fixture(params=["native", "reference"], autouse=True)
def kernel(request, monkeypatch):
    """Run a test with each of the kernels for CPU tensors."""
    assert library.reason() is None
    monkeypatch.setattr(ops.dispatch, "cpu_kernel", lambda: request.param)


def normalize(x, weight=None, bias=None, activation=None, residual=None, mean=None, var=None):
    """Normalize a training batch."""
    return bn.batch_norm(x, mean, var, weight, bias, True, activation=activation, residual=residual)


def oracle(x):
    """Return y of the reference in float64."""
    x = x.double()
    return reference.forward(Operands(x), reference.moments(x), Rule(1e-5, None, training=True))


def by_autograd(x, weight, bias, residual, mask, activation, eps=1e-5):
    """Return y by the formula, whose gradient autograd computes."""
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    counts = torch.ones_like(x[:, :1]) if mask is None else mask.unsqueeze(1).expand_as(x[:, :1]).to(x.dtype)
    m = counts.sum()
    mean = (x * counts).sum(dims, keepdim=True) / m
    var = ((x - mean) ** 2 * counts).sum(dims, keepdim=True) / m
    z = (x - mean) / torch.sqrt(var + eps) * weight.view(shape) + bias.view(shape) + residual
    functions = {None: lambda z: z, "leaky_relu": lambda z: torch.nn.functional.leaky_relu(z, 0.01)}
    function = functions.get(activation) or getattr(torch.nn.functional, activation)
    return function(z) * counts


def case(shape, seed=0):
    x, residual = randn64(*shape, seed=seed), randn64(*shape, seed=seed + 1)
    weight, bias = (
        randn64(shape[1], seed=seed + 2) + 2,
        randn64(shape[1], seed=seed + 3),
    )
    return [t.requires_grad_() for t in (x, weight, bias, residual)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_equal_autograd_of_the_formula(shape, activation):
    inputs = case(shape)
    dy = randn64(*shape, seed=9)
    ours = normalize(*inputs[:3], activation, inputs[3])
    theirs = by_autograd(*inputs, None, activation)
    # float64 rounds at 1e-16 and a sum of n terms at about n times that; n < 1000 here
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, other in zip(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_masked_outputs_and_gradients_equal_autograd_of_the_formula(mask, activation):
    inputs = case((4, 5, 3, 2))
    dy = randn64(4, 5, 3, 2, seed=9)
    ours = bn.batch_norm(
        inputs[0], None, None, *inputs[1:3], True, activation=activation, residual=inputs[3], mask=mask
    )
    theirs = by_autograd(*inputs, mask, activation)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, other in zip(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False], ids=["batch statistics", "running statistics"])
@pytest.mark.parametrize("mask", [None, MASKS["both"]], ids=["no mask", "mask"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_and_second_derivatives_equal_finite_differences(activation, mask, training):
    inputs = case((4, 2, 3, 2), seed=5)
    mean, var = (None, None) if training else (randn64(2, seed=7), randn64(2, seed=8) ** 2)

    def function(x, weight, bias, residual):
        return bn.batch_norm(x, mean, var, weight, bias, training, activation=activation, residual=residual, mask=mask)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("hidden", [0.0, 1e6, math.nan, math.inf])
def test_nothing_depends_on_what_the_padding_holds(hidden):
    x, weight, bias, residual = case((4, 5, 3, 2))
    mask = MASKS["both"]
    inside = mask.unsqueeze(1).expand_as(x)
    dirty = [torch.where(inside, t.detach(), hidden).requires_grad_() for t in (x, residual)]
    clean = [torch.where(inside, t.detach(), 0.0).requires_grad_() for t in (x, residual)]
    dy = torch.where(inside, randn64(4, 5, 3, 2, seed=9), hidden)
    results = []
    for some_x, some_residual in (dirty, clean):
        mean, var = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
        y = bn.batch_norm(some_x, mean, var, weight, bias, True, activation="silu", residual=some_residual, mask=mask)
        gradients = torch.autograd.grad(y, [some_x, weight, bias, some_residual], dy)
        results.append([y, mean, var, *gradients])
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)
    assert not results[0][0][~inside].any()
    assert not results[0][3][~inside].any()
    assert not results[0][6][~inside].any()


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "sliced", "expanded"])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e3, 1e5])
def test_float32_is_within_1e_5_of_the_oracle_at_any_ratio_of_mean_to_deviation(ratio, layout):
    x = randn(16, 3, 9, 7, dtype=torch.float32) + ratio
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = randn(16, 6, 9, 14, dtype=torch.float32)[:, ::2, :, ::2] + ratio
    elif layout == "expanded":
        x = x[:, :, :1].expand(16, 3, 9, 7)
    assert (normalize(x) - oracle(x)).abs().max() <= 1e-5


@pytest.mark.parametrize("rows", [37, 1000])
@pytest.mark.parametrize("constant", [0.1, 100.1, 1e7, 1 / 3])
@pytest.mark.parametrize("masked", [False, True])
def test_a_constant_channel_gives_exactly_beta(constant, rows, masked):
    beta = torch.tensor([0.3])
    mask = torch.arange(rows) % 3 > 0 if masked else None
    y = bn.batch_norm(torch.full((rows, 1), constant), None, None, None, beta, True, mask=mask)
    assert torch.equal(y[slice(None) if mask is None else mask], beta.expand(rows, 1)[: mask.sum() if masked else rows])


def test_an_outlier_in_front_does_no_harm():
    x = randn(1000, 4, dtype=torch.float32)
    x[0] = 1e4
    expected = oracle(x)
    # the outlier's y is 31.6, where 1e-5 is 5 units in the last place, so its bound is relative
    assert ((normalize(x) - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all()


@pytest.mark.parametrize("ratio", [0.0, 1e3, 1e5])
def test_float32_gradients_are_those_of_the_oracle_at_any_ratio_of_mean_to_deviation(ratio):
    x = (randn(64, 3, 5, dtype=torch.float32) + ratio).requires_grad_()
    weight, bias = randn(3, seed=2, dtype=torch.float32).requires_grad_(), torch.zeros(3, requires_grad=True)
    dy = randn(64, 3, 5, seed=1, dtype=torch.float32)
    gradients = torch.autograd.grad(normalize(x, weight, bias), (x, weight, bias), dy)
    exact = x.detach().double()
    operands, rule = Operands(exact, weight.detach().double()), Rule(1e-5, None, training=True)
    expected = reference.backward(dy.double(), operands, reference.moments(exact), rule)
    # x_hat is off by at most 1e-5, a sum of 320 products by at most 320e-5 x max |dy| < 0.02
    torch.testing.assert_close(gradients[0].double(), expected[0], rtol=1e-5, atol=1e-5 * 10)
    torch.testing.assert_close(gradients[1].double(), expected[1], rtol=0, atol=0.02)
    torch.testing.assert_close(gradients[2].double(), expected[2], rtol=1e-5, atol=1e-4)


def test_running_statistics_are_right_where_the_variance_is_far_below_eps():
    x = 1e-5 * randn(50, 3, dtype=torch.float32) + 3
    mean, var = torch.zeros(3), torch.zeros(3)
    for _ in range(300):
        normalize(x, mean=mean, var=var)
    torch.testing.assert_close(mean.double(), x.double().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.double().var(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_float32_result_rounded_once(dtype):
    whole = torch.ones(1, 1, dtype=torch.bool)
    x, dy = randn(8, 3, 5, dtype=dtype), randn(8, 3, 5, seed=1, dtype=dtype)
    results = []
    for some in (x, x.float()):
        some = some.clone().requires_grad_()
        y = bn.batch_norm(some, None, None, training=True, mask=whole)
        (dx,) = torch.autograd.grad(y, some, dy.to(y.dtype))
        results.append((y, dx))
    for half, single in zip(*results, strict=True):
        assert torch.equal(half, single.to(dtype))


@pytest.mark.parametrize(("x_dtype", "layer_dtype"), list(itertools.permutations([torch.float32, torch.float64], 2)))
def test_parameters_of_another_precision_than_the_input_are_right(x_dtype, layer_dtype):
    x = randn(8, 3, dtype=x_dtype).requires_grad_()
    layer = bn.BatchNorm1d(3, dtype=layer_dtype)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x_dtype
    assert layer.weight.grad.dtype == layer_dtype
    torch.testing.assert_close(y.double(), torch.nn.BatchNorm1d(3).double()(x.double()), rtol=0, atol=1e-6)


def test_the_moments_count_what_the_mask_keeps():
    x = randn64(4, 5, 3, 2)
    mask = MASKS["both"]
    moments = reference.moments(x, mask)
    kept = x.movedim(1, 0)[:, mask]
    assert int(moments.count) == mask.sum()
    torch.testing.assert_close(moments.mean, kept.mean(1))
    torch.testing.assert_close(moments.var, kept.var(1, correction=0))
