"""The native kernels held to the formula in float64, whose gradients are left to autograd."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import batchnorm as bn
from batchnorm import ops
from batchnorm.kernels import library, native, reference
from batchnorm.kernels.chosen import cpu_kernel
from batchnorm.kernels.records import BatchMoments, Operands, Rule, Running

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
FUNCTIONS = {None: lambda z: z, "relu": torch.relu, "leaky_relu": lambda z: torch.nn.functional.leaky_relu(z, 0.01)}

# Awkward small ones: one row, primes, one channel, one position, fewer positions than a vector has lanes, 7 x 7.
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
# From 196608 values on two threads share the work. From 8 MB on the output goes past the cache.
LARGE = [
    ((1, 1, 200_003), "contiguous"),  # a channel divided
    ((5, 3, 211, 67), "contiguous"),
    ((67, 61, 7, 7), "contiguous"),
    ((8, 4096, 7), "contiguous"),
    ((29, 7_001), "contiguous"),
    ((2503, 97), "contiguous"),
    ((509, 640), "contiguous"),
    ((5, 3, 211, 67), "channels last"),
    ((67, 61, 7, 7), "channels last"),
    ((2, 1, 331, 331), "channels last"),
    ((3, 130, 29, 23), "channels last"),
    ((2, 7, 11, 31, 47), "channels last"),
]
STREAMED = [
    ((2, 16, 211, 311), "contiguous"),
    ((8, 64, 65, 65), "channels last"),
    ((10_141, 208), "contiguous"),
]
# (affine, residual, mask, activation, training)
OPTIONS = {
    "plain": (False, False, False, None, True),
    "affine": (True, False, False, None, True),
    "relu": (True, False, False, "relu", True),
    "leaky": (True, False, False, "leaky_relu", True),
    "residual": (True, True, False, None, True),
    "residual, relu": (True, True, False, "relu", True),
    "mask": (True, False, True, None, True),
    "mask, residual, relu": (True, True, True, "relu", True),
    "mask, leaky, eval": (True, False, True, "leaky_relu", False),
    "eval": (False, False, False, None, False),
    "residual, relu, eval": (True, True, False, "relu", False),
}
SOME = {name: OPTIONS[name] for name in ("affine", "residual, relu", "mask, residual, relu")}


@pytest.fixture(autouse=True)
def native_kernels():
    """CPU tensors take the native kernels here."""
    assert library.reason() is None
    assert cpu_kernel() == "native"


@pytest.fixture
def threads():
    """A setter of torch's number of threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def numbers(*shape, seed=0, dtype=torch.float32):
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=drawn).to(dtype)


def laid_out(x, layout):
    if layout != "channels last":
        return x
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def by_channel(values, x):
    return values.view(1, -1, *[1] * (x.dim() - 2))


def excess(ours, theirs, bound):
    """The largest error as a part of what it may be; NaN where any is not a number."""
    rounding = torch.finfo(ours.dtype)
    stored = rounding.eps / 2 * theirs.abs() + rounding.smallest_normal * rounding.eps
    return ((ours.double() - theirs).abs() / (bound + stored)).max() if ours.numel() else torch.tensor(0.0)


def formula(x, weight, bias, residual, mask, activation, eps, given):
    """y, its argument z, x_hat, mean and biased variance, as the formulas read."""
    dims = [d for d in range(x.dim()) if d != 1]
    inside = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.unsqueeze(1).expand_as(x)
    x = torch.where(inside, x, 0.0)
    if given is None:
        m = inside[:, :1].sum().clamp(min=1)
        mean = x.sum(dims, keepdim=True) / m
        var = torch.where(inside, (x - mean) ** 2, 0.0).sum(dims, keepdim=True) / m
    else:
        mean, var = (by_channel(values.double(), x) for values in given)
    x_hat = (x - mean) / torch.sqrt(var + eps)
    z = x_hat if weight is None else x_hat * by_channel(weight, x)
    z = z if bias is None else z + by_channel(bias, x)
    z = z if residual is None else z + torch.where(inside, residual, 0.0)
    return torch.where(inside, FUNCTIONS[activation](z), 0.0), z, x_hat, mean.flatten(), var.flatten()


def check(x, weight=None, bias=None, residual=None, mask=None, activation=None, given=None, eps=1e-5, dy=None):
    """Hold y, the running statistics, the moments and all gradients to the formula in float64.

    Float sums hold at most 4096 values of a channel before they go on in double: 256 additions in the narrowest
    of vectors (4 lanes, 4 sums), whose error is at most 256 x 2**-24 = 1.5e-5 of the sum of magnitudes, were all
    roundings of one sign; so t = 1e-5, which is also what is promised of y. In double the same is 256 x 2**-53 =
    3e-14. Each
    result may be off by t of the magnitudes that went into it, and by its own rounding to the dtype it is stored in.
    """
    t = 1e-13 if x.dtype == torch.float64 else 1e-5
    dims = [d for d in range(x.dim()) if d != 1]
    given_ones = [values for values in (x, weight, bias, residual) if values is not None]
    exact = [
        None if values is None else values.detach().double().requires_grad_() for values in (x, weight, bias, residual)
    ]
    expected, z, x_hat, mean, var = formula(*exact, mask, activation, eps, given)

    ours = [None if values is None else values.detach().requires_grad_() for values in (x, weight, bias, residual)]
    training = given is None
    running_mean, running_var = (torch.zeros(x.shape[1]), torch.ones(x.shape[1])) if training else given
    running = Running(running_mean, running_var, torch.tensor(0), 0.25)
    y = ops.batch_norm(Operands(*ours, mask), running, Rule(eps, activation, training))
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert y.stride() == torch.empty_like(native.ready(x)).stride()

    size = 1 + x_hat.detach().abs()
    w = torch.ones(x.shape[1], dtype=torch.float64) if weight is None else weight.double().abs()
    scale = by_channel(w, x) * size
    scale = scale if bias is None else scale + by_channel(bias.double().abs(), x)
    scale = scale if residual is None else scale + residual.double().abs()
    scale = scale if mask is None else torch.where(mask.unsqueeze(1), scale, 0.0)
    assert excess(y.detach(), expected.detach(), t * scale) <= 1

    m = x.numel() // x.shape[1] if mask is None else int(mask.expand(x.shape[0], *x.shape[2:]).sum())
    mean, var = mean.detach(), var.detach()
    if training and m > 1:
        # The shift that squares are taken about is at most sqrt(8) standard deviations from the mean: 9 variances.
        assert excess(running_mean, 0.25 * mean, t * var.sqrt()) <= 1
        assert excess(running_var, 0.75 + 0.25 * var * m / (m - 1), 9 * t * var) <= 1

    # Gradients away from the kink: where y's bound does not tell the sign of z, dy is 0.
    dy = numbers(*x.shape, seed=99, dtype=x.dtype) if dy is None else dy
    if activation is not None:
        unsure = z.detach().abs() <= t * scale + torch.finfo(x.dtype).smallest_normal
        dy = torch.where(unsure, torch.zeros_like(dy), dy) if unsure.any() else dy
    gradients = torch.autograd.grad(y, [values for values in ours if values is not None], dy)
    wanted = torch.autograd.grad(expected, [values for values in exact if values is not None], dy.double())
    size_of_dz = dy.double().abs() if mask is None else torch.where(mask.unsqueeze(1), dy.double().abs(), 0.0)
    total, products = size_of_dz.sum(dims), (size_of_dz * size).sum(dims)
    inverse = (w / torch.sqrt(var + eps)).abs()
    of_x = size_of_dz
    if training:
        of_x = of_x + by_channel(total / max(m, 1), x) + size * by_channel(products / max(m, 1), x)
    bounds = [by_channel(inverse, x) * of_x]
    bounds += [] if weight is None else [products]
    bounds += [] if bias is None else [total]
    bounds += [] if residual is None else [size_of_dz]
    for values, mine, theirs, bound in zip(given_ones, gradients, wanted, bounds, strict=True):
        assert mine.dtype == values.dtype
        assert mine.shape == values.shape
        assert excess(mine, theirs, t * bound) <= 1


def case(shape, layout, dtype, options, *, ratio=0.0):
    """The tensors of a case, by what `check` calls them."""
    affine, with_residual, masked, activation, training = options
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    x = laid_out(numbers(*shape, dtype=dtype) + ratio, layout)
    mask = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(4)) > 0.3 if masked else None
    if masked:
        mask.view(-1)[:2] = True
    return {
        "x": x,
        "weight": numbers(shape[1], seed=1, dtype=parameters) + 2 if affine else None,
        "bias": numbers(shape[1], seed=2, dtype=parameters) if affine else None,
        "residual": laid_out(numbers(*shape, seed=3, dtype=dtype), layout) if with_residual else None,
        "mask": mask,
        "activation": activation,
        "given": None if training else (numbers(shape[1], seed=5), numbers(shape[1], seed=6).square() + 0.1),
    }


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), SMALL, ids=str)
def test_small_batches_are_those_of_the_formula(shape, layout, dtype, options):
    check(**case(shape, layout, dtype, options))


@pytest.mark.parametrize("options", SOME.values(), ids=SOME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "layout"), LARGE, ids=str)
def test_batches_that_two_threads_share_are_those_of_the_formula(shape, layout, dtype, options, threads):
    threads(2)
    check(**case(shape, layout, dtype, options))


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["residual, relu"]], ids=["plain", "residual, relu"])
@pytest.mark.parametrize(("shape", "layout"), STREAMED, ids=str)
def test_outputs_larger_than_the_cache_are_those_of_the_formula(shape, layout, options, threads):
    threads(2)
    check(**case(shape, layout, torch.float32, options))


def test_half_precision_outputs_larger_than_the_cache_are_those_of_the_formula(threads):
    threads(2)
    for shape, layout in (((2, 16, 211, 643), "contiguous"), ((16, 64, 65, 65), "channels last")):
        check(**case(shape, layout, torch.bfloat16, OPTIONS["relu"]))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"), [*(one for one in SMALL if one[0][0] > 1), ((509, 640), "contiguous"), *STREAMED], ids=str
)
def test_what_becomes_of_a_value_does_not_depend_on_where_it_stands(shape, layout, dtype, training, activation):
    """Loops take values singly, by the vector and by several: all must round alike."""
    channels, kinds = shape[1], 5
    draws = torch.Generator().manual_seed(0)
    which = [torch.randint(kinds, shape, generator=draws) for _ in range(2)]
    x, dy = (laid_out(numbers(kinds, seed=i, dtype=dtype)[of], layout) for i, of in enumerate(which))
    layer = bn.BatchNorm(channels, activation=activation).train(training)
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    place = torch.arange(channels).view(1, -1, *[1] * (x.dim() - 2)).expand(shape)
    of_x = (place * kinds + which[0]).flatten()
    for values, kind, count in ((y, of_x, kinds), (x.grad, of_x * kinds + which[1].flatten(), kinds**2)):
        values = values.detach().float().flatten()
        least, most = (
            values.new_zeros(channels * count).scatter_reduce(0, kind, values, how, include_self=False)
            for how in ("amin", "amax")
        )
        assert torch.equal(least, most)


def placed(x, how):
    """The same values, placed in memory in another way."""
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
    if how == "negated":  # for whoever reads it, to do
        return torch._neg_view(-x)
    return laid_out(x, "channels last")


PLACES = ["offset", "every second", "some channels", "transposed", "expanded", "negated", "channels last"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["x", "dy", "residual", "mask"])
@pytest.mark.parametrize("how", PLACES)
def test_it_does_not_matter_how_a_tensor_lies_in_memory(how, which, dtype):
    tensors = case((6, 5, 4, 9), "contiguous", dtype, OPTIONS["mask, residual, relu"])
    tensors["dy"] = numbers(6, 5, 4, 9, seed=8, dtype=dtype)
    if which == "mask":
        # the mask of a tensor of one channel, and so without it
        tensors["mask"] = placed(tensors["mask"].unsqueeze(1).byte().float(), how).squeeze(1) > 0
        tensors["mask"][0] = True
    else:
        tensors[which] = placed(tensors[which], how)
    check(**tensors)


@pytest.mark.parametrize(("shape", "layout"), [((2, 16, 211, 311), "contiguous"), ((8, 64, 65, 65), "channels last")])
def test_large_tensors_may_begin_anywhere(shape, layout, threads):
    threads(2)
    dtype = torch.float32
    x = numbers(*shape, dtype=dtype)
    if layout == "channels last":
        x = placed(x.permute(0, 2, 3, 1).contiguous(), "offset").permute(0, 3, 1, 2)
        assert x.is_contiguous(memory_format=torch.channels_last)
    else:
        x = placed(x, "offset")
    assert x.data_ptr() % 16
    check(x, activation="relu", dy=numbers(*shape, seed=8, dtype=dtype))


@pytest.mark.parametrize("bias", DTYPES, ids=str)
@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("x", DTYPES, ids=str)
def test_parameters_may_be_of_any_dtype(x, weight, bias):
    weight, bias = numbers(5, seed=1, dtype=weight) + 2, numbers(5, seed=2, dtype=bias)
    check(numbers(11, 5, 7, dtype=x), weight, bias, activation="leaky_relu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_may_be_strided(dtype):
    weight, bias = numbers(10, seed=1, dtype=dtype)[::2] + 2, numbers(1, seed=2, dtype=dtype).expand(5)
    check(numbers(11, 5, 7, dtype=dtype), placed(weight, "every second"), bias)


def test_a_mask_may_be_broadcast():
    x = numbers(6, 5, 4, 9)
    for shape in itertools.product((1, 6), (1, 4), (1, 9)):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
        mask.view(-1)[0] = True
        check(x, mask=mask, activation="relu")


# The running statistics.


@pytest.mark.parametrize("kept", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, None])
def test_running_statistics_and_the_counter_move_with_every_batch(momentum, kept):
    mean, var, batches = torch.zeros(3, dtype=kept), torch.ones(3, dtype=kept), torch.tensor(0)
    exact_mean, exact_var = mean.double().clone(), var.double().clone()
    for step in range(1, 4):
        x = numbers(17, 3, 5, seed=step) + step
        ops.batch_norm(Operands(x), Running(mean, var, batches, momentum), Rule(1e-5, None, True))
        share = 1 / step if momentum is None else momentum
        exact_mean = exact_mean + share * (x.double().mean((0, 2)) - exact_mean)
        exact_var = exact_var + share * (x.double().var((0, 2)) - exact_var)
    assert batches == 3
    # Each of 3 steps rounds once to the dtype they are kept in; the batch's own are good to 1e-5.
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1.5 * torch.finfo(kept).eps + 1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), exact_var, rtol=1.5 * torch.finfo(kept).eps + 1e-5, atol=1e-5)


@pytest.mark.parametrize("given", ["mean", "var"])
@pytest.mark.parametrize("kept", [torch.float32, torch.float64], ids=str)
def test_one_of_the_running_statistics_may_be_absent(given, kept):
    x = numbers(17, 3)
    mean = torch.zeros(3, dtype=kept) if given == "mean" else None
    var = torch.zeros(3, dtype=kept) if given == "var" else None
    ops.batch_norm(Operands(x), Running(mean, var, None, 1.0), Rule(1e-5, None, True))
    found, expected = (mean, x.double().mean(0)) if var is None else (var, x.double().var(0))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_running_statistics_may_be_of_two_dtypes():
    x, mean, var = numbers(17, 3), torch.zeros(3), torch.zeros(3, dtype=torch.float64)
    bn.batch_norm(x, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(var, x.double().var(0), rtol=1e-5, atol=0)
    y = bn.batch_norm(x, mean, var)
    torch.testing.assert_close(y.double(), (x - mean).double() / torch.sqrt(var + 1e-5), rtol=1e-5, atol=1e-5)


def test_the_running_statistics_may_be_strided():
    x, statistics = numbers(17, 3), torch.full((3, 2), 7.0)
    bn.batch_norm(x, statistics[:, 0], torch.zeros(3), training=True, momentum=1.0)
    torch.testing.assert_close(statistics[:, 0], x.mean(0), rtol=1e-5, atol=1e-6)
    assert (statistics[:, 1] == 7).all()


def test_eval_moves_nothing():
    mean, var, batches = torch.zeros(3), torch.ones(3), torch.tensor(0)
    ops.batch_norm(Operands(numbers(17, 3)), Running(mean, var, batches, 0.5), Rule(1e-5, None, False))
    assert not mean.any()
    assert (var == 1).all()
    assert batches == 0


# Accuracy.


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "rows"])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2, 1e3, 1e5])
def test_the_error_of_float32_is_at_most_1e_5_at_any_ratio_of_mean_to_deviation(ratio, layout, threads):
    threads(2)
    x = numbers(20_011, 11) + ratio if layout == "rows" else laid_out(numbers(31, 11, 27, 29) + ratio, layout)
    y = bn.batch_norm(x, None, None, training=True)
    expected = formula(x.double(), None, None, None, None, None, 1e-5, None)[0]
    assert (y - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", ["planes", "rows", "channels last"])
@pytest.mark.parametrize("count", [37, 1000])
@pytest.mark.parametrize("constant", [0.1, 100.1, 1e7, 1 / 3, 1e-40, 1e30, 3e38])
def test_a_constant_channel_gives_exactly_beta(constant, count, layout):
    shape = {"planes": (1, 3, count), "rows": (count, 3), "channels last": (1, 3, count, 1)}[layout]
    beta = torch.tensor([0.3, -7.0, 1e-3])
    x = laid_out(torch.full(shape, constant), layout)
    y = bn.batch_norm(x, None, None, torch.tensor([1.0, 3.0, -2.0]), beta, True)
    assert torch.equal(y, by_channel(beta, x).expand_as(x))


@pytest.mark.parametrize("layout", ["planes", "rows", "channels last"])
@pytest.mark.parametrize(("size", "eps"), [(1e30, 1e-5), (1e37, 1e-5), (1e-38, 0.0), (1e-40, 0.0), (1e-40, 1e-80)])
def test_values_near_the_ends_of_float_are_those_of_the_formula(size, eps, layout):
    shape = {"planes": (4, 3, 50), "rows": (200, 3), "channels last": (4, 3, 10, 5)}[layout]
    x = laid_out((numbers(*shape, dtype=torch.float64) * size).float(), layout).requires_grad_()
    weight, bias = torch.tensor([1.0, -2.0, 0.5], requires_grad=True), torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    exact = [values.detach().double().requires_grad_() for values in (x, weight, bias)]
    # dy as large as x where x is small: else dx, which is as large as dy / x, would not fit a float
    dy = numbers(*shape, seed=9) * min(size, 1)
    y = bn.batch_norm(x, None, None, weight, bias, True, eps=eps)
    expected = formula(*exact, None, None, None, eps, None)[0]
    gradients = torch.autograd.grad(y, (x, weight, bias), dy)
    wanted = torch.autograd.grad(expected, exact, dy.double())
    # Computed in double and rounded once, to a float that may be subnormal (here 1e-5 of the largest is far above that
    # spacing for all but dy below 1e-38, whose own sums are exact in double).
    for mine, theirs in zip((y, *gradients), (expected, *wanted), strict=True):
        assert (mine.double() - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1.4e-45


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("outlier", [1e4, 1e10, 1e20])
def test_an_outlier_in_front_does_no_harm(outlier, layout):
    x = numbers(10, 4, 10, 10)
    x[0, :, 0, 0] = outlier
    x = laid_out(x, layout)
    expected = formula(x.double(), None, None, None, None, None, 1e-5, None)[0]
    # its own y is sqrt(999) = 31.6, where 1e-5 is 5 units in the last place: there the bound is relative
    assert ((bn.batch_norm(x, None, None, training=True) - expected).abs() <= 1e-5 * expected.abs().clamp(min=1)).all()


# NaN and infinity.


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_gives_what_the_reference_gives(bad, activation, training, dtype, layout):
    x = numbers(4, 5, 6, 7, dtype=dtype)
    x[1, 2, 3, 4] = bad
    x = laid_out(x, layout).requires_grad_()
    statistics = torch.zeros(5), torch.ones(5)
    exact = x.detach().double()
    used = reference.moments(exact) if training else BatchMoments(*(s.double() for s in statistics), 168)
    y = bn.batch_norm(x, *statistics, training=training, activation=activation)
    dy = numbers(4, 5, 6, 7, seed=1, dtype=dtype)
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
    tensors["dy"] = laid_out(numbers(6, 5, 4, 9, seed=8), layout)
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
def test_a_mask_that_keeps_nothing_gives_zeros_and_moves_nothing(shape):
    x = numbers(*shape).requires_grad_()
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
    # 2**-128 does not fit the float loops: it takes the careful way, value by value in double.
    x = every_pattern(dtype).view(shape)
    channels, factor = shape[1], torch.tensor(factor).item()  # as a float has it
    mask = torch.ones(1, *[1] * (len(shape) - 2), dtype=torch.bool) if masked else None
    weight = torch.full((channels,), factor, dtype=torch.float64)
    y = bn.batch_norm(x, torch.zeros(channels), torch.ones(channels), weight, eps=0.0, mask=mask)
    expected = (x.double() * factor).float().to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    # equal as numbers: of two zeros the sign is not held
    assert torch.equal(y.nan_to_num(0.0, math.inf, -math.inf), expected.nan_to_num(0.0, math.inf, -math.inf))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001])
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_no_bits_of_a_nan_make_it_a_number(weight_dtype, x_dtype, bits):
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    x, weight = numbers(6, 1, dtype=x_dtype), torch.ones(1, dtype=weight_dtype, requires_grad=True)
    assert bn.batch_norm(x, None, None, nan, training=True).isnan().all()
    assert bn.batch_norm(x, None, None, None, nan, training=True).isnan().all()
    assert bn.batch_norm(x, nan, torch.ones(1)).isnan().all()
    x = numbers(6, 1)
    x[0] = nan
    x = x.to(x_dtype)
    mean = torch.zeros(1, dtype=weight_dtype)
    y = bn.batch_norm(x, mean, torch.ones(1, dtype=weight_dtype), weight, training=True)
    assert y.isnan().all()
    assert mean.isnan().all()
    assert torch.autograd.grad(y, weight, torch.ones_like(y))[0].isnan().all()


# Threads and processes.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), LARGE, ids=str)
def test_the_number_of_threads_matters_to_no_more_than_rounding(shape, layout, dtype, threads):
    # Only where the sums of a channel are divided can anything differ: t of `check`, twice. Then y's own rounding.
    x = laid_out(numbers(*shape, dtype=dtype), layout)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(bn.batch_norm(x, None, None, training=True))
    t = 2e-13 if dtype == torch.float64 else 2e-5
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=t + torch.finfo(dtype).eps, atol=t)


def test_set_num_threads_is_obeyed(threads):
    # The one channel is divided in as many parts as there are threads, and each division rounds in its own way.
    x = numbers(1, 1, 300_007, dtype=torch.float32)
    found = {}
    for count in (1, 2, 3, 1, 2, 3):
        threads(count)
        mean, var = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        bn.batch_norm(x, mean, var, training=True, momentum=1.0)
        found.setdefault(count, set()).add((mean.item(), var.item()))
    assert [len(results) for results in found.values()] == [1, 1, 1]
    assert len(set.union(*found.values())) == 3


def test_four_python_threads_at_once_get_what_one_gets(threads):
    threads(2)
    batches = [numbers(8, 16, 40, 41, seed=seed) for seed in range(4)]

    def step(x):
        x = x.detach().requires_grad_()
        y = bn.batch_norm(x, None, None, training=True, activation="leaky_relu")
        return y.detach(), torch.autograd.grad(y, x, x.detach().cos())[0]

    alone = [step(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(step, batches * 3))
    for (y, dx), (other_y, other_dx) in zip(alone * 3, together, strict=True):
        # A new Python thread may be lent another number of threads: rounding, as above.
        torch.testing.assert_close(other_y, y, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(other_dx, dx, rtol=2e-5, atol=2e-5)


class Normalised(Dataset):
    """Batches, normalised in the process that loads them."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return bn.batch_norm(numbers(16, 16, 32, 32, seed=index), None, None, training=True)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python's own word on fork beside threads
def test_workers_forked_after_parallel_work_finish(threads):
    threads(2)
    here = [Normalised()[index] for index in range(4)]
    loaded = list(DataLoader(Normalised(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60))
    for mine, theirs in zip(loaded, here, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)


# Nothing to do, and nothing that can be done.


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
        bn.batch_norm(numbers(4, 3), training=training, **arguments)
