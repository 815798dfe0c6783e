"""Properties of every batch: random shapes, dtypes, layouts and options of the layers."""

import contextlib

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import batchnorm as bn
from batchnorm.kernels import reference
from batchnorm.kernels.records import BatchMoments
from support import PassThroughMode

SIZES = st.one_of(st.integers(1, 6), st.sampled_from([7, 13, 16, 17, 33]))
SEEDS = st.integers(0, 2**31)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
# Float32 sums hold 256 values at most before they go on in double: 256 x 2**-24 = 1.5e-5 were all roundings of one
# sign; 1e-5 is also what is promised. In double the same is 3e-14.
UNIT = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def examples(count):
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@st.composite
def shapes(draw, least=2):
    """Draw a shape (N, C, *) of 2 to 4 dimensions, with at least a given number of samples."""
    shape = [draw(SIZES) for _ in range(draw(st.integers(2, 4)))]
    shape[0] = max(shape[0], least)
    return shape


@st.composite
def batches(draw, least=2):
    """Draw a batch and a channel_dim: contiguous, channels last in memory or in dimensions, or permuted."""
    shape = draw(shapes(least))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    dim = draw(st.sampled_from([1, -1]))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = (x * draw(st.sampled_from([0.1, 1.0, 30.0])) + draw(st.sampled_from([0.0, 1.0, -30.0]))).to(draw(DTYPES))
    x = x.movedim(1, dim)
    kind = draw(st.sampled_from(["as it is", "contiguous", "channels last", "reversed"]))
    if kind == "contiguous":
        x = x.contiguous()
    elif kind == "channels last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == "reversed":
        order = list(reversed(range(x.dim())))
        x = x.permute(order).contiguous().permute(order)
    return x, dim


def exact(x, dim):
    """Return the values of each channel in float64, (C, M)."""
    return x.detach().double().movedim(dim, 0).flatten(1)


@examples(150)
@given(batches())
def test_normalized_output_has_mean_0_and_variance_var_over_var_plus_eps(batch):
    x, dim = batch
    y = exact(bn.BatchNorm(x.shape[dim], channel_dim=dim)(x), dim)
    var = exact(x, dim).var(1, correction=0)
    # Each y is off by t of 1 + |y|, and by its own rounding; 1 + |y| is 2 in the mean square.
    t = 2 * UNIT[x.dtype] + torch.finfo(x.dtype).eps
    assert (y.mean(1).abs() <= t).all()
    assert ((y.var(1, correction=0) - var / (var + 1e-5)).abs() <= 4 * t).all()


@examples(150)
@given(
    shapes(),
    SEEDS,
    st.floats(-6, 6).map(lambda power: 10.0**power),
    st.floats(-1e3, 1e3),
    st.sampled_from([1e-5, 1e-3]),
    st.sampled_from([None, "relu", "tanh"]),
)
def test_output_is_invariant_to_a_scale_and_a_shift_of_the_input(shape, seed, a, b, eps, activation):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    one, other = (
        bn.BatchNorm(shape[1], eps=value, activation=activation, dtype=torch.float64) for value in (eps, a * a * eps)
    )
    # a x + a b is rounded by 2**-53 of its size; x_hat by that over a sqrt(var + eps). The first 1 is x's own size.
    var = x.movedim(1, 0).flatten(1).var(1, correction=0).view(-1, *[1] * (len(shape) - 2))
    bound = 1e-14 * (1 + abs(b)) * (1 + x.abs()) / torch.sqrt(var + eps)
    assert ((other(a * (x + b)) - one(x)).abs() <= 1e-13 + bound).all()


@examples(150)
@given(batches(least=3), SEEDS, st.booleans(), st.sampled_from([None, "leaky_relu", "gelu"]))
def test_a_permuted_batch_gives_the_permuted_output_and_the_same_statistics(batch, seed, masked, activation):
    x, dim = batch
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(x.shape[0], generator=generator)
    residual = torch.randn(x.shape, generator=generator).to(x.dtype)
    positions = list(x.shape)
    del positions[dim]
    mask = torch.rand(positions, generator=generator) > 0.3 if masked else None
    one, other = (bn.BatchNorm(x.shape[dim], channel_dim=dim, activation=activation) for _ in range(2))
    y = one(x, residual, mask)
    permuted = other(x[order], residual[order], None if mask is None else mask[order])
    # Twice the bound of a y, of the size of x_hat and of the residual; one more rounding where a half stores z.
    t = 2 * UNIT[x.dtype] + 2 * torch.finfo(x.dtype).eps
    values = exact(x, dim)
    size = 2 + (values - values.mean(1, keepdim=True)).abs().max() / torch.sqrt(
        values.var(1, correction=0).min() + 1e-5
    )
    if masked:
        size = 2 + (values.max() - values.min()) / 1e-5**0.5
    size = size + residual.abs().max()
    assert ((permuted.double() - y[order].double()).abs() <= t * size).all()
    deviation = values.std(1, correction=0).max() + values.abs().max() * 1e-6
    # The statistics are kept in float32.
    assert ((one.running_mean - other.running_mean).abs() <= 1e-5 * deviation + 1e-6 * one.running_mean.abs()).all()
    assert ((one.running_var - other.running_var).abs() <= 1e-5 * (deviation**2 + 1)).all()


@examples(150)
@given(shapes(), SEEDS, st.data())
def test_moments_of_the_parts_of_a_batch_are_pooled_to_those_of_the_whole(shape, seed, data):
    generator = torch.Generator().manual_seed(seed)
    offset = data.draw(st.sampled_from([0.0, 1.0, 1e4]))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[0]), max_size=4)))
    parts = torch.tensor_split(x, cuts)  # two equal cuts leave an empty part between them
    means, variances = [], []
    for part in parts:
        values = part.movedim(1, 0).flatten(1)
        empty = values.shape[1] == 0
        means.append(torch.full((shape[1],), torch.nan) if empty else values.mean(1))
        variances.append(torch.full((shape[1],), torch.nan) if empty else values.var(1, correction=0))
    counts = torch.tensor([part.numel() // shape[1] for part in parts])
    whole = reference.pooled(BatchMoments(torch.stack(means), torch.stack(variances), counts))
    values = x.movedim(1, 0).flatten(1)
    assert whole.count == values.shape[1]
    # Means are off by 2**-53 of the offset times a few; their squares of it.
    torch.testing.assert_close(whole.mean, values.mean(1), rtol=0, atol=1e-14 * (1 + offset))
    torch.testing.assert_close(whole.var, values.var(1, correction=0), rtol=1e-12, atol=1e-14 * (1 + offset))


# Options together.

FUNCTIONS = {
    None: lambda z: z,
    "relu": torch.relu,
    "leaky_relu": lambda z: torch.nn.functional.leaky_relu(z, 0.01),
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def by_channel(values, x):
    return values.view(1, -1, *[1] * (x.dim() - 2))


def divided(samples, positions, size):
    """Return the ends of the virtual batches; a last one with one value per channel joins the one before."""
    if size is None:
        return [slice(0, samples)]
    starts = list(range(0, samples, size))
    if len(starts) > 1 and (samples - starts[-1]) * positions == 1:
        starts.pop()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], samples], strict=True)]


def masked_moments(x, inside):
    dims = [d for d in range(x.dim()) if d != 1]
    count = inside[:, :1].sum().clamp(min=1)
    mean = torch.where(inside, x, 0.0).sum(dims, keepdim=True) / count
    return mean, torch.where(inside, (x - mean) ** 2, 0.0).sum(dims, keepdim=True) / count, count


def formula(x, residual, weight, bias, mask, dy, running, options):
    """Return y and z in float64, chunk by chunk, and the size of the terms of y and dx."""
    eps, renorm = 1e-5, options["renorm"]
    inside = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.unsqueeze(1).expand_as(x)
    running_mean, running_var = (by_channel(values.double(), x) for values in running)
    w, b = by_channel(weight, x), by_channel(bias, x)
    z, sizes, of_dx, of_weight = [], [], [], 0.0
    for at in divided(x.shape[0], x[0, 0].numel(), options["virtual_batch_size"]):
        mean, var, count = masked_moments(x[at], inside[at])
        deviation = torch.sqrt(var + eps)
        r, d = torch.ones_like(mean), torch.zeros_like(mean)
        if renorm is not None:
            sigma = torch.sqrt(running_var + eps)
            r = (deviation / sigma).clamp(1 / renorm.r_max, renorm.r_max).detach()
            d = ((mean - running_mean) / sigma).clamp(-renorm.d_max, renorm.d_max).detach()
        x_hat = (x[at] - mean) / deviation
        z.append(w * (r * x_hat + d) + b + (0 if residual is None else residual[at]))
        with torch.no_grad():
            dims = [i for i in range(x.dim()) if i != 1]
            size = 1 + x_hat.abs()
            terms = [w.abs() * (r * size + d.abs()), b.abs(), 0 if residual is None else residual[at].abs()]
            sizes.append(sum(terms))
            # The activation's derivative, up to 1.13, is off by its own slope, up to 1, times the error of z.
            dz = torch.where(inside[at], dy[at].abs() * (1.2 + sizes[-1]), 0.0)
            total, products = dz.sum(dims, keepdim=True), (dz * size).sum(dims, keepdim=True)
            of_dx.append((w.abs() * r / deviation) * (dz + total / count + size * products / count))
            of_weight = of_weight + (r * products + d.abs() * total).flatten()
    z = torch.cat(z)
    y = torch.where(inside, FUNCTIONS[options["activation"]](z), 0.0)
    with torch.no_grad():
        dz = torch.where(inside, dy.abs() * (1.2 + torch.cat(sizes)), 0.0)
    bounds = [torch.cat(of_dx), of_weight, dz.sum([d for d in range(x.dim()) if d != 1]), dz]
    return y, z.detach(), torch.cat(sizes), bounds


def hold(name, ours, theirs, bound):
    """Check that the error is within the bound and the rounding of the dtype in which the result is stored."""
    allowed = bound + torch.finfo(ours.dtype).eps * theirs.abs() + 1e-30
    wrong = ~((ours.detach().double() - theirs.detach()).abs() <= allowed)
    assert not wrong.any(), (name, ours[wrong][:3], theirs[wrong][:3])


@st.composite
def cases(draw):
    shape = draw(shapes())
    generator = torch.Generator().manual_seed(draw(SEEDS))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    limits = draw(st.sampled_from([None, (1.0, 0.0), (1.5, 0.5), (3.0, 5.0), (1e3, 1e3)]))
    options = {
        "virtual_batch_size": draw(st.sampled_from([None, 2, 3, 5, 8])),
        "renorm": None if limits is None else bn.Renorm(*limits),
        "activation": draw(st.sampled_from(list(FUNCTIONS))),
    }
    mask = None
    if draw(st.booleans()):
        sizes = [draw(st.sampled_from([size, size, 1])) for size in (shape[0], *shape[2:])]
        mask = torch.rand(sizes, generator=generator) > draw(st.sampled_from([0.1, 0.5, 0.9]))

    def drawn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": drawn(*shape) * 2 + draw(st.sampled_from([0.0, 3.0])),
        "residual": drawn(*shape) if draw(st.booleans()) else None,
        "weight": drawn(shape[1]),
        "bias": drawn(shape[1]),
        "dy": drawn(*shape),
        "running": (drawn(shape[1]), 0.5 + drawn(shape[1]).square()),
        "mask": mask,
        "pad": draw(st.sampled_from([0.0, 1e6, float("nan")])),
        "options": options,
        "dim": draw(st.sampled_from([1, -1])),
        "momentum": draw(st.sampled_from([0.25, None])),
        "unbiased": draw(st.sampled_from([True, False])),
        "way": draw(st.sampled_from([contextlib.nullcontext, PassThroughMode])),
    }


@examples(250)
@given(cases())
def test_options_together_are_the_formula_in_float64(case):
    x, residual, weight, bias, dy, mask = (case[n] for n in ("x", "residual", "weight", "bias", "dy", "mask"))
    dim, options, running = case["dim"], case["options"], case["running"]
    t = 3 * UNIT[x.dtype]  # of x_hat, of r and of d
    leaves = [None if v is None else v.double().requires_grad_() for v in (x, residual, weight, bias)]
    expected, z, size, _ = formula(*leaves, mask, dy.double(), running, options)
    if options["activation"] in ("relu", "leaky_relu"):  # gradients away from the kink
        dy = torch.where(z.abs() <= t * size, 0.0, dy)
        expected, z, size, bounds = formula(*leaves, mask, dy.double(), running, options)
    else:
        bounds = formula(*leaves, mask, dy.double(), running, options)[3]
    gradients = torch.autograd.grad(expected, [v for v in leaves if v is not None], dy.double())

    layer = bn.BatchNorm(
        x.shape[1],
        dtype=x.dtype,
        channel_dim=dim,
        momentum=case["momentum"],
        unbiased=case["unbiased"],
        **options,
    )
    with torch.no_grad():
        for held, values in zip((layer.weight, layer.bias, *layer.buffers()), (weight, bias, *running), strict=False):
            held.copy_(values)
        layer.num_batches_tracked.fill_(3)
    hole = None if mask is None else mask.unsqueeze(1)

    def given_to_layer(values):
        return (values if hole is None else torch.where(hole, values, case["pad"])).movedim(1, dim)

    ours = [None if v is None else given_to_layer(v).detach().requires_grad_() for v in (x, residual)]
    with case["way"]():
        y = layer(*ours, mask)
        asked = [v for v in (*ours, layer.weight, layer.bias) if v is not None]
        found = torch.autograd.grad(y, asked, given_to_layer(dy))

    hold("y", y.movedim(dim, 1), expected, t * size)
    names = ["dx", "dresidual", "dweight", "dbias"] if residual is not None else ["dx", "dweight", "dbias"]
    bound_of = dict(zip(("dx", "dweight", "dbias", "dresidual"), bounds, strict=True))
    for name, mine, theirs in zip(names, found, gradients, strict=True):
        mine = mine.movedim(dim, 1) if name in ("dx", "dresidual") else mine
        hold(name, mine, theirs, t * bound_of[name])

    inside = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.unsqueeze(1).expand_as(x)
    mean, var, _ = masked_moments(x.double(), inside)
    m = int(inside[:, :1].sum())
    share = (0.25 if case["momentum"] is not None else 1 / 4) * (m > 1)
    kept = var.flatten() * (m / max(m - 1, 1) if case["unbiased"] else 1)
    for name, buffer, old, new in (
        ("running mean", layer.running_mean, running[0], mean.flatten()),
        ("running var", layer.running_var, running[1], kept),
    ):
        old = old.double()
        hold(name, buffer, old + share * (new - old), 9 * t * (kept + kept.sqrt()))
    assert layer.num_batches_tracked == 4
    assert layer.skipped_batches == 0
