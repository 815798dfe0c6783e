"""Virtual batches, renormalization and updates of the native kernels, against float64 chunk by chunk."""

import math

import pytest
import torch

from batchnorm import ops
from batchnorm.kernels import native
from batchnorm.kernels.records import BatchMoments, Limits, Operands, Rule, Running
from kernel_oracle import DTYPES, FUNCTIONS
from support import by_channel, full_mask, largest_excess, randn, reduced_dims, with_layout

EPS = 1e-5
pytestmark = pytest.mark.usefixtures("native_kernels")
# Shape, layout, samples per chunk: primes, one channel, two samples, one position, last chunks of fewer or more.
SHAPES = [
    ((2, 3), "contiguous", 2),
    ((4, 1), "contiguous", 2),
    ((13, 7), "contiguous", 5),
    ((37, 127), "contiguous", 12),
    ((5, 3, 1), "contiguous", 2),
    ((6, 1, 11), "contiguous", 1),
    ((11, 5, 7), "contiguous", 3),
    ((2, 17, 49), "contiguous", 1),
    ((7, 3, 3, 5), "contiguous", 2),
    ((7, 3, 3, 5), "channels last", 2),
    ((5, 1, 3, 3), "channels last", 4),
    ((23, 19, 1, 1), "channels last", 7),
    ((9, 70, 5, 3), "channels last", 4),
    ((5, 3, 2, 3, 5), "channels last", 2),
]
# Two threads share the work from 196608 values on: whole chunks if each is small, else the values of each chunk.
LARGE = [
    ((1031, 211), "contiguous", 4),  # 258 chunks
    ((431, 13, 37), "contiguous", 3),
    ((211, 13, 11, 7), "channels last", 5),
    ((67, 3001), "contiguous", 3),
    ((3, 3, 151, 149), "contiguous", 1),  # 22499 values per channel, shared in each chunk
    ((6, 3, 151, 149), "channels last", 3),
]
# Limits of r and d, or given values; residual; mask; activation.
OPTIONS = {
    "plain": (None, False, False, None),
    "limits": (Limits(1.2, 0.3), False, False, "relu"),
    "tight limits": (Limits(1.0, 0.0), False, True, "leaky_relu"),
    "given, residual, mask": ("given", True, True, "relu"),
    "limits, residual, mask": (Limits(1e3, 1e3), True, True, "leaky_relu"),
}


def divided(samples, chunk, positions=2):
    """Return the slices of chunks; the last takes the samples left, or joins the one before if it has one value."""
    count = -(-samples // chunk)
    if count > 1 and samples % chunk * positions == 1:
        count -= 1
    return [slice(i * chunk, (i + 1) * chunk if i + 1 < count else samples) for i in range(count)]


def normalized(x):
    """Return x_hat by the formula."""
    dims = reduced_dims(x)
    return (x - x.mean(dims, keepdim=True)) / torch.sqrt(x.var(dims, keepdim=True, correction=0) + EPS)


def moments_of(x, inside):
    """Return mean, biased variance and count of a batch, in float64."""
    count = int(inside[:, :1].sum())
    mean = torch.where(inside, x, 0.0).sum(reduced_dims(x)) / max(count, 1)
    away = torch.where(inside, x - by_channel(mean, x), 0.0)
    return mean, (away * away).sum(reduced_dims(x)) / max(count, 1), count


def corrections(mean, var, running_mean, running_var, limits):
    """Return r and d of Ioffe (2017), algorithm 1."""
    sigma = torch.sqrt(running_var.double() + EPS)
    r = (torch.sqrt(var + EPS) / sigma).clamp(1 / limits.r_max, limits.r_max)
    return r, ((mean - running_mean.double()) / sigma).clamp(-limits.d_max, limits.d_max)


def assert_matches_formula(shape, layout, chunk, dtype, options):
    """Compare y, moments, r and d, and all gradients of every chunk with the formula in float64.

    The bound t is derived in `kernel_oracle.assert_matches_formula`; r and d add an error of t, hence 2 t.
    """
    t = 2 * (1e-13 if dtype == torch.float64 else 1e-5)
    limits, with_residual, masked, activation = options
    x = with_layout(randn(*shape, dtype=dtype) + 0.5, layout)
    weight, bias = randn(shape[1], seed=1), randn(shape[1], seed=2)
    residual = with_layout(randn(*shape, seed=3, dtype=dtype), layout) if with_residual else None
    mask = randn(shape[0], *shape[2:], seed=4) > -0.5 if masked else None
    running_mean, running_var = randn(shape[1], seed=5), 0.5 + randn(shape[1], seed=6).square()
    slices = divided(shape[0], chunk, x[0, 0].numel())
    chunks = len(slices)
    given = None
    if limits == "given":
        given = torch.stack((1 + randn(chunks, shape[1], seed=7).square(), randn(chunks, shape[1], seed=8))).double()
        given = given if chunks > 1 else given[:, 0].contiguous()
    rule = Rule(EPS, activation, True, chunks, chunk if chunks > 1 else 0, None if given is not None else limits, given)

    running = Running(running_mean.clone(), running_var.clone(), torch.tensor(3), 0.25)
    y, moments, correction = native.forward(Operands(x, weight, bias, residual, mask), running, rule)
    assert y.dtype == dtype
    assert y.stride() == x.stride()
    assert moments.shape == (2, *([chunks] if chunks > 1 else []), shape[1])
    assert (correction is None) if limits is None else (correction.shape == moments.shape)

    exact = [None if v is None else v.double().requires_grad_() for v in (x, residual, weight, bias)]
    inside, outputs, arguments, sizes, hats, used = full_mask(x, mask), [], [], [], [], []
    lengths = [at.stop - at.start for at in slices]
    residuals = [None] * chunks if residual is None else exact[1].split(lengths)
    for i, (part, ins, added) in enumerate(zip(exact[0].split(lengths), inside.split(lengths), residuals, strict=True)):
        mean, var, _ = moments_of(part, ins)
        r, d = torch.ones(shape[1]).double(), torch.zeros(shape[1]).double()
        if given is not None:
            r, d = given.view(2, chunks, -1)[:, i]
        elif limits is not None:
            r, d = corrections(mean.detach(), var.detach(), running_mean, running_var, limits)
        used.append(torch.stack((mean.detach(), var.detach(), r, d)))
        x_hat = (part - by_channel(mean, part)) / torch.sqrt(by_channel(var, part) + EPS)
        z = by_channel(exact[2], part) * (by_channel(r, part) * x_hat + by_channel(d, part)) + by_channel(
            exact[3], part
        )
        z = z if added is None else z + added
        arguments.append(z.detach())
        outputs.append(torch.where(ins, FUNCTIONS[activation](z), 0.0))
        with torch.no_grad():
            hats.append(1 + x_hat.abs())
            size = by_channel(weight.double().abs(), part) * (
                by_channel(r, part) * hats[-1] + by_channel(d.abs(), part)
            )
            size = size + by_channel(bias.double().abs(), part)
            sizes.append(size if added is None else size + added.abs())

    mean, var, r, d = torch.stack(used, 1)  # for each chunk and channel
    assert largest_excess(moments.view(2, chunks, -1)[0], mean, t * var.sqrt()) <= 1
    # The shift that is subtracted before squaring is at most sqrt(8) deviations from the mean: 9 variances.
    assert largest_excess(moments.view(2, chunks, -1)[1], var, 9 * t * var) <= 1
    if given is not None:
        assert torch.equal(correction, given)
    elif limits is not None:
        assert largest_excess(correction.view(2, chunks, -1)[0], r, 9 * t * r) <= 1
        assert (
            largest_excess(correction.view(2, chunks, -1)[1], d, t * (1 + torch.sqrt(var / (running_var + EPS)))) <= 1
        )
    expected, size = torch.cat(outputs), torch.cat(sizes)
    assert largest_excess(y, expected.detach(), t * size) <= 1

    dy = randn(*shape, seed=99, dtype=dtype)
    if activation is not None:  # gradients are compared away from the kink
        dy = torch.where(torch.cat(arguments).abs() <= t * size + torch.finfo(dtype).smallest_normal, 0.0, dy)
    dy = with_layout(dy, layout)
    wanted = torch.autograd.grad(expected, [v for v in exact if v is not None], dy.double())
    wanted = dict(zip(("dx", *(["dresidual"] if with_residual else []), "dweight", "dbias"), wanted, strict=True))
    rule = rule._replace(correction=correction)
    asked = [True, True, True, with_residual]
    operands = Operands(x, weight, bias, None, mask)
    found = native.backward(dy, operands, moments, rule, y=y if with_residual else None, wanted=asked)
    found = dict(zip(("dx", "dweight", "dbias", "dresidual"), found, strict=True))
    dz = torch.where(inside, dy.double().abs(), 0.0)
    of_dx, of_weight = [], 0.0
    for at, hat, (_, var, r, d) in zip(slices, hats, used, strict=True):
        m = max(int(inside[at][:, :1].sum()), 1)
        total, products = dz[at].sum(reduced_dims(x)), (dz[at] * hat).sum(reduced_dims(x))
        gain = weight.double().abs() * r / torch.sqrt(var + EPS)
        of_dx.append(by_channel(gain, x) * (dz[at] + by_channel(total / m, x) + hat * by_channel(products / m, x)))
        of_weight = of_weight + r * products + d.abs() * total
    bounds = {"dx": torch.cat(of_dx), "dresidual": dz, "dweight": of_weight, "dbias": dz.sum(reduced_dims(x))}
    for name, theirs in wanted.items():
        assert largest_excess(found[name], theirs, t * bounds[name]) <= 1, name

    mean, var, count = moments_of(x.double(), inside)
    share = 0.25 if count > 1 else 0.0
    var = var * count / max(count - 1, 1)
    assert running.batches == 4
    assert largest_excess(running.mean, running_mean + share * (mean - running_mean), t * var.sqrt()) <= 1
    assert largest_excess(running.var, running_var + share * (var - running_var), 9 * t * var) <= 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout", "chunk"), SHAPES, ids=str)
def test_every_chunk_is_that_of_the_formula(shape, layout, chunk, dtype, options):
    assert_matches_formula(shape, layout, chunk, dtype, options)


@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.float32, "limits, residual, mask"), (torch.bfloat16, "limits")], ids=str
)
@pytest.mark.parametrize(("shape", "layout", "chunk"), LARGE, ids=str)
def test_chunks_that_two_threads_share_are_those_of_the_formula(shape, layout, chunk, dtype, options, set_threads):
    set_threads(2)
    assert_matches_formula(shape, layout, chunk, dtype, OPTIONS[options])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout", "chunk"), LARGE[:4], ids=str)
def test_chunks_shared_among_threads_give_bitwise_what_one_thread_gives(shape, layout, chunk, dtype, set_threads):
    slices = divided(shape[0], chunk, 2)
    x, dy = (with_layout(randn(*shape, seed=seed, dtype=dtype), layout) for seed in (0, 1))
    weight = randn(shape[1], seed=2)
    results = []
    for count in (1, 2):
        set_threads(count)
        running = Running(torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(0), 0.5)
        rule = Rule(EPS, None, True, len(slices), chunk, Limits(3.0, 5.0))
        y, moments, correction = native.forward(Operands(x, weight), running, rule)
        rule = rule._replace(correction=correction)
        gradients = native.backward(dy, Operands(x, weight), moments, rule, wanted=[True] * 4)
        results.append([y, moments, correction, *running[:2], *gradients[:2]])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("shape", "layout"), [((12, 5), "contiguous"), ((12, 5, 3, 3), "channels last")], ids=str)
def test_chunks_are_the_batches_one_by_one(shape, layout):
    x, weight, bias = with_layout(randn(*shape), layout), randn(5, seed=1), randn(5, seed=2)
    none = Running(None, None, None, 0.0)
    y, moments, _ = native.forward(Operands(x, weight, bias), none, Rule(EPS, "relu", True, 3, 4))
    for i, part in enumerate(x.split(4)):
        alone, own, _ = native.forward(Operands(part, weight, bias), none, Rule(EPS, "relu", True))
        # Other loops may sum the whole than the part.
        torch.testing.assert_close(y[4 * i : 4 * i + 4], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments[:, i], own, rtol=1e-6, atol=1e-6)


# Updates of the running statistics.


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("kept", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("counting", [True, False])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_statistics_are_updated_as_by_torch_operations(bad, counting, unbiased, update, momentum, kept, chunks):
    x = randn(12, 3, 4) + 2
    if bad is not None:
        x[5, 1, 2] = bad

    def running_statistics():
        skipped = torch.tensor(7) if counting else None
        return Running(
            randn(3, seed=1, dtype=kept), randn(3, seed=2, dtype=kept).exp(), torch.tensor(4), momentum, skipped,
            unbiased, update,
        )  # fmt: skip

    ours, theirs, before = (running_statistics() for _ in range(3))
    native.forward(Operands(x), ours, Rule(EPS, None, True, chunks, 4 if chunks > 1 else 0))
    exact = x.double()
    ops.running.update_(theirs, BatchMoments(exact.mean((0, 2)), exact.var((0, 2), correction=0), 48))
    # The moments are accurate to 1e-5 of a deviation, and float32 rounds the statistics.
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-6, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(ours.var, theirs.var, rtol=1e-6, atol=9e-5, equal_nan=True)
    assert ours.batches == theirs.batches
    assert ours.skipped is None or ours.skipped == theirs.skipped
    poisoned = bad is not None and counting
    updates = update and not poisoned
    assert ours.batches == (5 if updates else 4)
    assert not counting or ours.skipped == (8 if poisoned and update else 7)
    if not updates:
        assert torch.equal(ours.mean, before.mean)
        assert torch.equal(ours.var, before.var)


def test_updated_statistics_are_torchs():
    x = randn(12, 3, 4) + 2
    for unbiased in (True, False):
        running = Running(torch.zeros(3), torch.ones(3), torch.tensor(0), 1.0, torch.tensor(0), unbiased)
        native.forward(Operands(x), running, Rule(EPS, None, True, 3, 4))
        torch.testing.assert_close(running.mean, x.mean((0, 2)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(running.var, x.var((0, 2), correction=1 if unbiased else 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["rows", "contiguous", "channels last"])
def test_a_chunk_with_a_nan_stops_the_update_of_all_and_other_chunks_stay_right(layout, kept):
    shape = {"rows": (12, 5), "contiguous": (12, 5, 7), "channels last": (12, 5, 3, 3)}[layout]
    x = with_layout(randn(*shape), layout)
    clean = x.clone(memory_format=torch.preserve_format)
    x[5, 2] = math.nan  # the second of four chunks
    running = Running(torch.zeros(5, dtype=kept), torch.ones(5, dtype=kept), torch.tensor(4), 0.5, torch.tensor(0))
    y, moments, correction = native.forward(Operands(x), running, Rule(EPS, None, True, 4, 3, Limits(3.0, 5.0)))
    assert (int(running.skipped), int(running.batches)) == (1, 4)
    assert not running.mean.any()
    assert (running.var == 1).all()
    none = Running(torch.zeros(5), torch.ones(5), update=False)
    other, _, _ = native.forward(Operands(clean), none, Rule(EPS, None, True, 4, 3, Limits(3.0, 5.0)))
    left = [c for c in range(5) if c != 2]
    assert torch.equal(y[:, left], other[:, left])
    assert torch.equal(y[[*range(3), *range(6, 12)]], other[[*range(3), *range(6, 12)]])
    assert y[3:6, 2].isnan().all()
    assert moments[:, 1, 2].isnan().all()
    assert correction[:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("chunk_of_padding", [0, 1, 3])
def test_a_chunk_of_padding_alone_is_left_out_of_the_statistics_whatever_it_holds(chunk_of_padding):
    x, mask = randn(12, 5, 7) + 3, torch.ones(12, 7, dtype=torch.bool)
    padding = slice(3 * chunk_of_padding, 3 * chunk_of_padding + 3)
    x[padding], mask[padding] = math.nan, False
    running = Running(torch.zeros(5), torch.ones(5), torch.tensor(0), 1.0, torch.tensor(0))
    y, moments, _ = native.forward(Operands(x, mask=mask), running, Rule(EPS, None, True, 4, 3))
    values = x[mask.any(1)].double()
    torch.testing.assert_close(running.mean.double(), values.mean((0, 2)), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(running.var.double(), values.var((0, 2)), rtol=1e-6, atol=9e-5)
    assert (int(running.skipped), int(running.batches)) == (0, 1)
    assert not y[padding].any()
    dx, *_ = native.backward(y, Operands(x, mask=mask), moments, Rule(EPS, None, True, 4, 3), wanted=[True] * 4)
    assert not dx[padding].any()
    assert dx.isfinite().all()


@pytest.mark.parametrize("layout", ["rows", "contiguous", "channels last"])
@pytest.mark.parametrize("size", [1e30, 1e37])
def test_chunks_whose_variance_no_float_holds_have_the_right_y_and_are_skipped(size, layout):
    shape = {"rows": (12, 5), "contiguous": (12, 5, 7), "channels last": (12, 5, 3, 3)}[layout]
    x = with_layout(randn(*shape), layout)
    x[:, 1] *= size
    x[4:8, 3] *= size
    running = Running(torch.zeros(5), torch.ones(5), torch.tensor(0), 0.5, torch.tensor(0))
    rule = Rule(EPS, None, True, 3, 4)
    y, moments, _ = native.forward(Operands(x), running, rule)
    parts = x.double().split(4)
    expected = torch.cat([normalized(part) for part in parts])
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert (int(running.skipped), int(running.batches)) == (1, 0)
    assert not running.mean.any()
    assert (running.var == 1).all()
    wide = Running(torch.zeros(5).double(), torch.ones(5).double(), torch.tensor(0), 1.0, torch.tensor(0))
    native.forward(Operands(x), wide, rule)
    assert (int(wide.skipped), int(wide.batches)) == (0, 1)
    torch.testing.assert_close(wide.var, x.double().var(reduced_dims(x)), rtol=1e-4, atol=1e-5)

    # dx is the gradient of y divided by a deviation of that size; scaled back, it is that of the values before.
    dy = randn(*shape, seed=1)
    dx, *_ = native.backward(dy, Operands(x), moments, rule, wanted=[True, False, False, False])
    leaf = x.double().requires_grad_()
    y = torch.cat([normalized(part) for part in leaf.split(4)])
    (wanted,) = torch.autograd.grad(y, leaf, dy.double())
    deviation = torch.cat([part.std(reduced_dims(x), keepdim=True, correction=0).expand_as(part) for part in parts])
    smallest = torch.finfo(torch.float32).smallest_normal
    assert ((dx.double() - wanted).abs() <= 1e-4 / deviation + smallest).all()
