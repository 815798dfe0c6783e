"""The native kernels on values that are hard to compute with: large means, extremes of a dtype, NaN and infinity."""

import math

import pytest
import torch

import batchnorm as bn
from batchnorm.kernels import reference
from batchnorm.kernels.records import BatchMoments, Operands, Rule
from kernel_oracle import DTYPES, OPTIONS, case, formula
from support import by_channel, randn, with_layout

HALVES = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("native_kernels")


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "rows"])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2, 1e3, 1e5])
def test_the_error_of_float32_is_at_most_1e_5_at_any_ratio_of_mean_to_deviation(ratio, layout, set_threads):
    set_threads(2)
    x = randn(20_011, 11) + ratio if layout == "rows" else with_layout(randn(31, 11, 27, 29) + ratio, layout)
    y = bn.batch_norm(x, None, None, training=True)
    expected = formula(x.double(), None, None, None, None, None, 1e-5, None)[0]
    assert (y - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", ["contiguous", "rows", "channels last"])
@pytest.mark.parametrize("count", [37, 1000])
@pytest.mark.parametrize("constant", [0.1, 100.1, 1e7, 1 / 3, 1e-40, 1e30, 3e38])
def test_a_constant_channel_gives_exactly_beta(constant, count, layout):
    shape = {"contiguous": (1, 3, count), "rows": (count, 3), "channels last": (1, 3, count, 1)}[layout]
    beta = torch.tensor([0.3, -7.0, 1e-3])
    x = with_layout(torch.full(shape, constant), layout)
    y = bn.batch_norm(x, None, None, torch.tensor([1.0, 3.0, -2.0]), beta, True)
    assert torch.equal(y, by_channel(beta, x).expand_as(x))


@pytest.mark.parametrize("layout", ["contiguous", "rows", "channels last"])
@pytest.mark.parametrize(("size", "eps"), [(1e30, 1e-5), (1e37, 1e-5), (1e-38, 0.0), (1e-40, 0.0), (1e-40, 1e-80)])
def test_values_near_the_limits_of_float_match_the_formula(size, eps, layout):
    shape = {"contiguous": (4, 3, 50), "rows": (200, 3), "channels last": (4, 3, 10, 5)}[layout]
    x = with_layout((randn(*shape, dtype=torch.float64) * size).float(), layout).requires_grad_()
    weight, bias = torch.tensor([1.0, -2.0, 0.5], requires_grad=True), torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    exact = [values.detach().double().requires_grad_() for values in (x, weight, bias)]
    # dy is as small as x where x is small; otherwise dx, which is of the size of dy / x, would not fit a float
    dy = randn(*shape, seed=9) * min(size, 1)
    y = bn.batch_norm(x, None, None, weight, bias, True, eps=eps)
    expected = formula(*exact, None, None, None, eps, None)[0]
    gradients = torch.autograd.grad(y, (x, weight, bias), dy)
    wanted = torch.autograd.grad(expected, exact, dy.double())
    # Results are computed in double and rounded once, to a float that may be subnormal. For all but dy below 1e-38,
    # whose sums are exact in double, 1e-5 of the largest value is far above the spacing of subnormal numbers.
    for mine, theirs in zip((y, *gradients), (expected, *wanted), strict=True):
        assert (mine.double() - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1.4e-45


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("outlier", [1e4, 1e10, 1e20])
def test_an_outlier_in_front_does_no_harm(outlier, layout):
    x = randn(10, 4, 10, 10)
    x[0, :, 0, 0] = outlier
    x = with_layout(x, layout)
    expected = formula(x.double(), None, None, None, None, None, 1e-5, None)[0]
    # the outlier's y is sqrt(999) = 31.6, where 1e-5 is 5 units in the last place, so its bound is relative
    assert ((bn.batch_norm(x, None, None, training=True) - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all()


# NaN and infinity.


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_give_the_results_of_the_reference(bad, activation, training, dtype, layout):
    x = randn(4, 5, 6, 7, dtype=dtype)
    x[1, 2, 3, 4] = bad
    x = with_layout(x, layout).requires_grad_()
    statistics = torch.zeros(5), torch.ones(5)
    exact = x.detach().double()
    used = reference.moments(exact) if training else BatchMoments(*(s.double() for s in statistics), 168)
    y = bn.batch_norm(x, *statistics, training=training, activation=activation)
    dy = randn(4, 5, 6, 7, seed=1, dtype=dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    rule = Rule(1e-5, activation, training)
    expected = reference.forward(Operands(exact), used, rule)
    wanted, *_ = reference.backward(dy.double(), Operands(exact), used, rule)
    for mine, theirs in ((y.detach(), expected), (dx, wanted)):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine.isinf(), theirs.isinf())
        assert mine[:, [0, 1, 3, 4]].isfinite().all()
    if training:
        assert y[:, 2].isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_padding_may_hold_anything(layout):
    tensors = case((6, 5, 4, 9), layout, torch.float32, OPTIONS["mask, residual, relu"])
    tensors["dy"] = with_layout(randn(6, 5, 4, 9, seed=8), layout)
    for name in ("x", "residual", "dy"):
        tensors[name] = torch.where(tensors["mask"].unsqueeze(1), tensors[name], math.nan)
    clean = {name: torch.nan_to_num(tensors[name]) for name in ("x", "residual", "dy")}
    results = []
    for some in (tensors, {**tensors, **clean}):
        leaves = [some[name].detach().requires_grad_() for name in ("x", "weight", "bias", "residual")]
        y = bn.batch_norm(
            leaves[0], None, None, *leaves[1:3], True, activation="relu", residual=leaves[3], mask=some["mask"]
        )
        results.append([y, *torch.autograd.grad(y, leaves, some["dy"])])
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)
        assert mine.isfinite().all()


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4)], ids=str)
def test_a_mask_that_keeps_nothing_gives_zeros_and_updates_nothing(shape):
    x = randn(*shape).requires_grad_()
    weight, bias = (torch.ones(5, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(5), torch.ones(5)
    mask = torch.zeros(shape[0], *shape[2:], dtype=torch.bool)
    y = bn.batch_norm(x, mean, var, weight, bias, True, mask=mask)
    for values in (y, mean, *torch.autograd.grad(y, (x, weight, bias), torch.ones_like(x))):
        assert not values.any()
    assert (var == 1).all()


# Half precision.


def every_pattern(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("shape", [(1, 1, 2**16), (2**16, 1), (2**14, 2, 2), (512, 128), (2**13, 8)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1 / 3, 1.001, 1.0 + 2.0**-8, 2.0**-12, 300.0, 2.0**-128, 2.0**-136])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_all_65536_half_precision_numbers_are_converted_as_torch_does(dtype, factor, masked, shape):
    # 2**-128 does not fit the float loops, so it is computed value by value in double.
    x = every_pattern(dtype).view(shape)
    channels, factor = shape[1], torch.tensor(factor).item()  # rounded to float
    mask = torch.ones(1, *[1] * (len(shape) - 2), dtype=torch.bool) if masked else None
    weight = torch.full((channels,), factor, dtype=torch.float64)
    y = bn.batch_norm(x, torch.zeros(channels), torch.ones(channels), weight, eps=0.0, mask=mask)
    expected = (x.double() * factor).float().to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    # compared as numbers: the sign of zero may differ
    assert torch.equal(y.nan_to_num(0.0, math.inf, -math.inf), expected.nan_to_num(0.0, math.inf, -math.inf))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001])
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_no_bits_of_a_nan_make_it_a_number(weight_dtype, x_dtype, bits):
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    x, weight = randn(6, 1, dtype=x_dtype), torch.ones(1, dtype=weight_dtype, requires_grad=True)
    assert bn.batch_norm(x, None, None, nan, training=True).isnan().all()
    assert bn.batch_norm(x, None, None, None, nan, training=True).isnan().all()
    assert bn.batch_norm(x, nan, torch.ones(1)).isnan().all()
    x = randn(6, 1)
    x[0] = nan
    x = x.to(x_dtype)
    mean = torch.zeros(1, dtype=weight_dtype)
    y = bn.batch_norm(x, mean, torch.ones(1, dtype=weight_dtype), weight, training=True)
    assert y.isnan().all()
    assert mean.isnan().all()
    assert torch.autograd.grad(y, weight, torch.ones_like(y))[0].isnan().all()
