"""The native kernels against the reference in float64, on random shapes, strides, dtypes, masks and options.

Every run tries the same few hundred examples. ``BATCHNORM_FUZZ=20000 pytest tests/kernels/test_fuzz.py`` tries as many
new ones.
"""

import os

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchnorm import ops
from batchnorm.kernels import reference
from batchnorm.kernels.chosen import cpu_kernel
from batchnorm.kernels.records import BatchMoments, Operands, Rule, Running
from kernel_oracle import DTYPES
from support import by_channel, reduced_dims

EXAMPLES = int(os.environ.get("BATCHNORM_FUZZ", "0"))
SIZES = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 49, 64, 65, 127, 130]))


@st.composite
def shapes(draw):
    shape = [draw(SIZES) for _ in range(draw(st.integers(2, 5)))]
    while torch.Size(shape).numel() > 60_000:
        shape[shape.index(max(shape))] //= 2
    if torch.Size(shape).numel() == shape[1]:
        shape[0] += 1
    return shape


def tensor(draw, shape, dtype, generator, *, ratio=0.0):
    """Draw random numbers of a shape with a random memory layout: permuted, strided, offset, expanded."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape]
    starts = [draw(st.integers(0, 2)) for _ in shape]
    expanded = [d for d, size in enumerate(shape) if size > 1 and draw(st.integers(0, 9)) == 0]
    if len(expanded) and draw(st.booleans()):
        expanded = []
    sizes = [1 if d in expanded else starts[d] + steps[d] * size for d, size in enumerate(shape)]
    if torch.Size(sizes).numel() > 400_000:
        sizes, steps, starts, expanded = list(shape), [1] * len(shape), [0] * len(shape), []
    whole = torch.randn([sizes[d] for d in order], generator=generator, dtype=torch.float64) + ratio
    whole = whole.to(dtype).permute([order.index(d) for d in range(len(shape))])
    for d in range(len(shape)):
        if d not in expanded:
            whole = whole.narrow(d, starts[d], sizes[d] - starts[d])
    return whole[tuple(slice(None, None, step) for step in steps)].expand(shape)


@st.composite
def cases(draw):
    shape, dtype = draw(shapes()), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    training = draw(st.booleans())
    ratio = draw(st.sampled_from([0.0, 0.0, 1.0, 30.0]))

    def parameter(offset):
        if draw(st.booleans()):
            return None
        return (torch.randn(shape[1], generator=generator) + offset).to(draw(st.sampled_from(DTYPES)))

    mask = None
    if draw(st.integers(0, 2)) == 0:
        sizes = [draw(st.sampled_from([size, 1])) for size in (shape[0], *shape[2:])]
        mask = torch.rand(sizes, generator=generator) > draw(st.sampled_from([0.1, 0.5, 0.9]))
    return {
        "x": tensor(draw, shape, dtype, generator, ratio=ratio),
        "weight": parameter(2.0),
        "bias": parameter(0.0),
        "residual": tensor(draw, shape, dtype, generator) if draw(st.integers(0, 2)) == 0 else None,
        "mask": mask,
        "dy": tensor(draw, shape, dtype, generator),
        "eps": draw(st.sampled_from([1e-5, 1e-3, 1e-8])),
        "activation": draw(st.sampled_from([None, "relu", "leaky_relu"])),
        "training": training,
        "threads": draw(st.sampled_from([1, 2])),
    }


def assert_within(name, ours, theirs, bound):
    """Check that the error is within the bound plus the rounding of the dtype in which the result is stored."""
    info = torch.finfo(ours.dtype)
    allowed = bound + info.eps / 2 * theirs.abs() + info.smallest_normal * info.eps
    overflow = theirs.abs() + bound >= info.max * (1 - info.eps)
    good = ((ours.double() - theirs).abs() <= allowed) | overflow
    assert good.all(), (name, ours[~good][:3], theirs[~good][:3])


@settings(
    max_examples=EXAMPLES or 300,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
@given(cases())
def test_outputs_gradients_and_running_statistics_are_those_of_float64(case):
    assert cpu_kernel() == "native"
    x, weight, bias, residual, mask, dy, eps, activation, training, threads = (
        case[name]
        for name in ("x", "weight", "bias", "residual", "mask", "dy", "eps", "activation", "training", "threads")
    )
    channels = x.shape[1]
    exact = [None if values is None else values.double() for values in (x, weight, bias, residual)]
    # The bound t is derived in `kernel_oracle.assert_matches_formula`.
    t = 1e-13 if x.dtype == torch.float64 else 1e-5
    mean, var = torch.zeros(channels), torch.ones(channels)
    used = reference.moments(exact[0], mask) if training else BatchMoments(mean.double(), var.double(), 0)
    operands, rule = Operands(*exact, mask), Rule(eps, activation, training)
    expected = reference.forward(operands, used, rule)
    z = reference.forward(operands, used, rule._replace(activation=None))
    size = 1 + ((exact[0] - by_channel(used.mean, x)) / torch.sqrt(by_channel(used.var, x) + eps)).abs()
    if x.dtype == torch.float64:  # the oracle's mean is rounded too
        size = size + by_channel(used.mean.abs() / torch.sqrt(used.var + eps), x)
    w = torch.ones(channels, dtype=torch.float64) if weight is None else exact[1].abs()
    scale = size * by_channel(w, x)
    for values in (None if bias is None else by_channel(exact[2], x), exact[3]):
        scale = scale if values is None else scale + values.abs()
    dy = torch.where(z.abs() <= t * scale + torch.finfo(x.dtype).smallest_normal, 0.0, dy) if activation else dy
    wanted = reference.backward(dy.double(), operands, used, rule)

    leaves = [None if values is None else values.detach().requires_grad_() for values in (x, weight, bias, residual)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        running = Running(mean, var, None, 0.5)
        y = ops.batch_norm(Operands(*leaves, mask), running, rule)
        found = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy))
    finally:
        torch.set_num_threads(before)
    gradients = [None if leaf is None else next(found) for leaf in leaves]

    assert_within("y", y.detach(), expected, t * scale)
    m = int(reference.count_of(x, mask))
    if training and m > 1:
        assert_within("running mean", mean, 0.5 * used.mean, t * used.var.sqrt())
        # the shift that is subtracted before squaring is at most sqrt(8) deviations from the mean
        assert_within("running var", var, 0.5 + 0.5 * used.var * m / (m - 1), 9 * t * used.var)
    dims = reduced_dims(x)
    dz = dy.double().abs() if mask is None else torch.where(mask.unsqueeze(1), dy.double().abs(), 0.0)
    total, products = dz.sum(dims), (dz * size).sum(dims)
    of_x = dz
    if training:
        of_x = of_x + by_channel(total / max(m, 1), x) + size * by_channel(products / max(m, 1), x)
    bounds = [of_x * by_channel(w / torch.sqrt(used.var + eps), x), products, total, dz]
    for name, mine, theirs, bound in zip(
        ("dx", "dweight", "dbias", "dresidual"), gradients, wanted, bounds, strict=True
    ):
        if mine is not None:
            assert_within(name, mine, theirs, t * bound)
