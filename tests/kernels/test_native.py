"""The native kernels against the formula in float64, whose gradients autograd computes."""

import itertools
import math

import pytest
import torch

import batchnorm as bn
from batchnorm import ops
from batchnorm.kernels.records import Operands, Rule, Running
from kernel_oracle import DTYPES, LARGE, OPTIONS, assert_matches_formula, case
from support import randn, with_layout

# Awkward sizes: one row, primes, one channel, one position, fewer positions than a vector has lanes, 7 x 7.
SMALL = [
    ((2, 1), "contiguous"),
    ((1, 3, 7), "contiguous"),
    ((37, 5), "contiguous"),
    ((3, 127), "contiguous"),
    ((2, 3001), "contiguous"),
    ((5, 3, 1), "contiguous"),
    *(((4, 3, length), "contiguous") for length in (2, 3, 4, 5, 6, 7)),
    ((3, 17, 49), "contiguous"),
    ((6, 1, 11), "contiguous"),
    ((2, 5, 3, 3), "contiguous"),
    ((2, 5, 3, 3), "channels last"),
    ((3, 1, 5, 5), "channels last"),
    ((13, 19, 1, 1), "channels last"),
    ((3, 70, 5, 3), "channels last"),
    ((41, 90, 7, 1), "channels last"),  # channels repeated in a row, positions left over
    ((2, 3, 2, 5, 3), "contiguous"),
    ((2, 3, 2, 5, 3), "channels last"),
]
STREAMED = [
    ((2, 16, 211, 311), "contiguous"),
    ((8, 64, 65, 65), "channels last"),
    ((10_141, 208), "contiguous"),
]
SOME = {name: OPTIONS[name] for name in ("affine", "residual, relu", "mask, residual, relu")}
pytestmark = pytest.mark.usefixtures("native_kernels")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), SMALL, ids=str)
def test_small_batches_match_the_formula(shape, layout, dtype, options):
    assert_matches_formula(**case(shape, layout, dtype, options))


@pytest.mark.parametrize("options", SOME.values(), ids=SOME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "layout"), LARGE, ids=str)
def test_batches_shared_by_two_threads_match_the_formula(shape, layout, dtype, options, set_threads):
    set_threads(2)
    assert_matches_formula(**case(shape, layout, dtype, options))


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["residual, relu"]], ids=["plain", "residual, relu"])
@pytest.mark.parametrize(("shape", "layout"), STREAMED, ids=str)
def test_outputs_larger_than_the_cache_match_the_formula(shape, layout, options, set_threads):
    set_threads(2)
    assert_matches_formula(**case(shape, layout, torch.float32, options))


def test_half_precision_outputs_larger_than_the_cache_match_the_formula(set_threads):
    set_threads(2)
    for shape, layout in (((2, 16, 211, 643), "contiguous"), ((16, 64, 65, 65), "channels last")):
        assert_matches_formula(**case(shape, layout, torch.bfloat16, OPTIONS["relu"]))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"), [*(one for one in SMALL if one[0][0] > 1), ((509, 640), "contiguous"), *STREAMED], ids=str
)
def test_the_result_of_a_value_does_not_depend_on_its_position(shape, layout, dtype, training, activation):
    """Loops compute single values, vectors and groups of vectors; all must round alike."""
    channels, kinds = shape[1], 5
    draws = torch.Generator().manual_seed(0)
    which = [torch.randint(kinds, shape, generator=draws) for _ in range(2)]
    x, dy = (with_layout(randn(kinds, seed=i, dtype=dtype)[of], layout) for i, of in enumerate(which))
    layer = bn.BatchNorm(channels, activation=activation).train(training)
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    channel = torch.arange(channels).view(1, -1, *[1] * (x.dim() - 2)).expand(shape)
    of_x = (channel * kinds + which[0]).flatten()
    for values, kind, count in ((y, of_x, kinds), (x.grad, of_x * kinds + which[1].flatten(), kinds**2)):
        values = values.detach().float().flatten()
        least, most = (
            values.new_zeros(channels * count).scatter_reduce(0, kind, values, how, include_self=False)
            for how in ("amin", "amax")
        )
        assert torch.equal(least, most)


def rearranged(x, how):
    """Return the same values with another memory layout."""
    if how == "offset":  # not aligned to more than one value
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if how == "every second":
        return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]
    if how == "some channels":
        return torch.cat([x, torch.full_like(x, math.nan)], 1)[:, : x.shape[1]]
    if how == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "expanded":
        return x[..., :1].expand_as(x)
    if how == "negated":  # a view whose values the reader must negate
        return torch._neg_view(-x)
    return with_layout(x, "channels last")


ARRANGEMENTS = ["offset", "every second", "some channels", "transposed", "expanded", "negated", "channels last"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["x", "dy", "residual", "mask"])
@pytest.mark.parametrize("how", ARRANGEMENTS)
def test_results_do_not_depend_on_the_memory_layout_of_a_tensor(how, which, dtype):
    tensors = case((6, 5, 4, 9), "contiguous", dtype, OPTIONS["mask, residual, relu"])
    tensors["dy"] = randn(6, 5, 4, 9, seed=8, dtype=dtype)
    if which == "mask":
        # a mask has no channel dimension
        tensors["mask"] = rearranged(tensors["mask"].unsqueeze(1).byte().float(), how).squeeze(1) > 0
        tensors["mask"][0] = True
    else:
        tensors[which] = rearranged(tensors[which], how)
    assert_matches_formula(**tensors)


@pytest.mark.parametrize(("shape", "layout"), [((2, 16, 211, 311), "contiguous"), ((8, 64, 65, 65), "channels last")])
def test_large_tensors_may_begin_anywhere(shape, layout, set_threads):
    set_threads(2)
    dtype = torch.float32
    x = randn(*shape, dtype=dtype)
    if layout == "channels last":
        x = rearranged(x.permute(0, 2, 3, 1).contiguous(), "offset").permute(0, 3, 1, 2)
        assert x.is_contiguous(memory_format=torch.channels_last)
    else:
        x = rearranged(x, "offset")
    assert x.data_ptr() % 16
    assert_matches_formula(x, activation="relu", dy=randn(*shape, seed=8, dtype=dtype))


@pytest.mark.parametrize("bias", DTYPES, ids=str)
@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("x", DTYPES, ids=str)
def test_parameters_may_be_of_any_dtype(x, weight, bias):
    weight, bias = randn(5, seed=1, dtype=weight) + 2, randn(5, seed=2, dtype=bias)
    assert_matches_formula(randn(11, 5, 7, dtype=x), weight, bias, activation="leaky_relu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_may_be_strided(dtype):
    weight, bias = randn(10, seed=1, dtype=dtype)[::2] + 2, randn(1, seed=2, dtype=dtype).expand(5)
    assert_matches_formula(randn(11, 5, 7, dtype=dtype), rearranged(weight, "every second"), bias)


def test_a_mask_may_be_broadcast():
    x = randn(6, 5, 4, 9)
    for shape in itertools.product((1, 6), (1, 4), (1, 9)):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
        mask.view(-1)[0] = True
        assert_matches_formula(x, mask=mask, activation="relu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (2, 3, 0), (2, 0), (2, 0, 5), (0, 3, 4, 4), (0, 0)], ids=str)
def test_empty_batches_give_empty_outputs_and_no_gradient(shape, dtype):
    x = torch.empty(shape, dtype=dtype, requires_grad=True)
    weight, bias = (torch.ones(shape[1], requires_grad=True) for _ in range(2))
    mean, var, batches = torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(0)
    y = ops.batch_norm(Operands(x, weight, bias), Running(mean, var, batches, 0.5), Rule(1e-5, "relu", True))
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(x))
    assert y.shape == dx.shape == shape
    assert not dweight.any()
    assert not dbias.any()
    assert not mean.any()
    assert (var == 1).all()
    assert batches == 1


@pytest.mark.parametrize("which", ["weight", "bias", "residual", "mask", "running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_a_tensor_on_another_device_is_an_error(which, training):
    there = {
        "weight": torch.ones(3, device="meta"),
        "bias": torch.ones(3, device="meta"),
        "residual": torch.ones(4, 3, device="meta"),
        "mask": torch.ones(4, dtype=torch.bool, device="meta"),
        "running_mean": torch.ones(3, device="meta"),
        "running_var": torch.ones(3, device="meta"),
    }
    arguments = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), which: there[which]}
    with pytest.raises(bn.InputError, match="meta"):
        bn.batch_norm(randn(4, 3), training=training, **arguments)
