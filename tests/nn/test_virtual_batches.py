"""virtual_batch_size: each chunk of a training batch is normalized by itself, and statistics are updated once."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import batchnorm as bn
from support import PassThroughMode, randn

EPS = 1e-5
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d
# Class, shape, memory format, dimension of the channels.
CASES = {
    "(N, C)": (bn.BatchNorm1d, (11, 3), None, 1),
    "(N, C, L)": (bn.BatchNorm1d, (7, 3, 5), None, 1),
    "(N, C, H, W)": (bn.BatchNorm2d, (7, 3, 2, 3), None, 1),
    "(N, C, H, W) channels last": (bn.BatchNorm2d, (7, 3, 2, 3), LAST, 1),
    "(N, C, D, H, W)": (bn.BatchNorm3d, (5, 3, 2, 1, 2), None, 1),
    "(N, C, D, H, W) channels last": (bn.BatchNorm3d, (5, 3, 2, 1, 2), LAST_3D, 1),
    "(N, L, C)": (bn.BatchNorm1d, (7, 5, 3), None, -1),
    "(N, H, W, C)": (bn.BatchNorm2d, (7, 2, 2, 3), None, -1),
    "(C, N, L)": (bn.BatchNorm, (3, 7, 5), None, 0),
}
SIZES = {11: [3, 3, 3, 2], 7: [3, 3, 1], 5: [3, 2]}  # chunks of 3, the last ragged
ACTIVATIONS = {None: lambda z: z, "relu": torch.relu, "gelu": nn.functional.gelu}


def formula(x, weight, bias, *, residual=None, mask=None, activation=None):
    """Normalize x (N, C, *) by its own statistics, as the paper writes it."""
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    counts = torch.ones_like(x) if mask is None else mask.unsqueeze(1).expand_as(x).to(x.dtype)
    total = counts.sum(dims, keepdim=True).clamp(min=1)
    mean = (x * counts).sum(dims, keepdim=True) / total
    var = ((x - mean) ** 2 * counts).sum(dims, keepdim=True) / total
    z = (x - mean) / torch.sqrt(var + EPS) * weight.view(shape) + bias.view(shape)
    return ACTIVATIONS[activation](z if residual is None else z + residual) * counts


def chunk_by_chunk(x, weight, bias, sizes, *, residual=None, mask=None, activation=None):
    """The formula on chunks of a given number of samples."""
    masks = [mask] * len(sizes) if mask is None or len(mask) == 1 else mask.split(sizes)
    residuals = [None] * len(sizes) if residual is None else residual.split(sizes)
    return torch.cat(
        [
            formula(part, weight, bias, residual=of_residual, mask=of_mask, activation=activation)
            for part, of_residual, of_mask in zip(x.split(sizes), residuals, masks, strict=True)
        ]
    )


def normal(shape, seed):
    return randn(*shape, seed=seed, dtype=torch.float64)


def laid_out(values, layout, dtype):
    values = values.to(dtype)
    return (values if layout is None else values.contiguous(memory_format=layout)).requires_grad_()


def ready(kind, channels, dtype, size, **options):
    layer = kind(channels, virtual_batch_size=size, **options)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 1.5, channels))
        layer.bias.copy_(torch.linspace(-0.3, 0.4, channels))
    return layer.double() if dtype == torch.float64 else layer


def run(layer, x, **given):
    """Return y, then the gradients of a weighted sum of it for x, gamma, beta and the residual."""
    y = layer(x, **given)
    dy = normal(y.shape, 9).to(y.dtype)
    wanted = [x, *layer.parameters(), *([given["residual"]] if given.get("residual") is not None else [])]
    return [y, *torch.autograd.grad(y, wanted, dy)]


def expected(layer, x, sizes, *, residual=None, mask=None):
    """Return the same in float64 by the formula."""
    dim = layer.channel_dim
    leaves = [v.detach().double().requires_grad_() for v in (x, *layer.parameters(), residual) if v is not None]
    moved = None if residual is None else leaves[3].movedim(dim, 1)
    options = {"residual": moved, "mask": mask, "activation": layer.activation}
    y = chunk_by_chunk(leaves[0].movedim(dim, 1), *leaves[1:3], sizes, **options).movedim(1, dim)
    dy = normal(y.shape, 9).to(x.dtype).double()
    return [y, *torch.autograd.grad(y, leaves, dy)]


def assert_equal(found, wanted, dtype):
    """Compare within some roundings of the largest number.

    A sum of M <= 60 terms errs by up to sqrt(M) < 8 roundings; float32's scale, the mean and gamma round too. In
    bfloat16 y, and with gelu its argument, are rounded before dz is made of them: 8 again.
    """
    for one, other in zip(found, wanted, strict=True):
        limit = 16 * torch.finfo(dtype).eps * max(1.0, other.abs().max().item())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=limit)


def unbiased(x, dim=1, mask=None):
    """Return the mean and unbiased variance of each channel over the values that count, in float64."""
    rows = x.detach().double().movedim(dim, -1)
    rows = rows.reshape(-1, rows.shape[-1]) if mask is None else rows[mask.expand(rows.shape[:-1])]
    mean = rows.mean(0)
    return mean, ((rows - mean) ** 2).sum(0) / (len(rows) - 1)


def assert_moved_once_by(layer, x, mask=None, momentum=0.1):
    mean, var = unbiased(x, layer.channel_dim, mask)
    old_mean, old_var = (1 - momentum) * torch.zeros_like(mean), (1 - momentum) * torch.ones_like(var)
    # moments are float64; the result is rounded to the buffer's dtype, at most three times
    limit = 4 * torch.finfo(layer.running_mean.dtype).eps
    torch.testing.assert_close(layer.running_mean.double(), old_mean + momentum * mean, rtol=limit, atol=limit)
    torch.testing.assert_close(layer.running_var.double(), old_var + momentum * var, rtol=limit, atol=limit)
    assert int(layer.num_batches_tracked) == 1


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_outputs_and_gradients_are_those_of_each_chunk(case, dtype, with_residual, activation):
    kind, shape, layout, dim = case
    layer = ready(kind, 3, dtype, 3, activation=activation, channel_dim=dim)
    x = laid_out(normal(shape, 1) * 2 + 3, layout, dtype)
    residual = laid_out(normal(shape, 2), layout, dtype) if with_residual else None
    found = run(layer, x, residual=residual)
    assert_equal(found, expected(layer, x, SIZES[x.movedim(dim, 1).shape[0]], residual=residual), dtype)
    assert_moved_once_by(layer, x)
    assert dim == 0 or found[0].stride() == x.stride()
    assert found[0].dtype == found[1].dtype == dtype


@pytest.mark.parametrize("kind_of_mask", ["each sample its own", "one for all samples", "one for all positions"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_mask_counts_within_each_chunk(case, dtype, activation, kind_of_mask):
    kind, shape, layout, dim = case
    layer = ready(kind, 3, dtype, 3, activation=activation, channel_dim=dim)
    x, residual = (laid_out(normal(shape, seed) * 2 + 3, layout, dtype) for seed in (1, 2))
    whole = x.detach().movedim(dim, 1)
    of_mask = [whole.shape[0], *whole.shape[2:]]
    if kind_of_mask == "one for all samples":
        of_mask[0] = 1
    elif kind_of_mask == "one for all positions":
        of_mask[1:] = [1] * len(of_mask[1:])
    mask = normal(of_mask, 3) < 0.4
    mask.view(-1)[:2] = True
    found = run(layer, x, residual=residual, mask=mask)
    assert_equal(found, expected(layer, x, SIZES[whole.shape[0]], residual=residual, mask=mask), dtype)
    assert_moved_once_by(layer, x, mask)


def test_a_chunk_in_which_nothing_counts_is_zero_and_moves_nothing():
    layer, x = ready(bn.BatchNorm1d, 3, torch.float64, 2), normal((6, 3), 1)
    mask = torch.tensor([True, True, False, False, True, True])
    x[2:4] = torch.nan
    x.requires_grad_()
    found = run(layer, x, mask=mask)
    assert found[0][2:4].abs().max() == 0
    assert found[1][2:4].abs().max() == 0
    clean = x.detach().nan_to_num().requires_grad_()
    assert_equal(found, expected(layer, clean, [2, 2, 2], mask=mask), torch.float64)
    assert_moved_once_by(layer, clean, mask)


@pytest.mark.parametrize(
    ("kind", "shape", "size", "sizes"),
    [
        (bn.BatchNorm1d, (10, 3), 3, [3, 3, 4]),
        (bn.BatchNorm1d, (5, 3), 4, [5]),
        (bn.BatchNorm1d, (10, 3), 4, [4, 4, 2]),
        (bn.BatchNorm1d, (9, 3), 3, [3, 3, 3]),
        (bn.BatchNorm1d, (4, 3), 4, [4]),
        (bn.BatchNorm1d, (3, 3), 64, [3]),
        (bn.BatchNorm1d, (10, 3, 1), 3, [3, 3, 4]),
        (bn.BatchNorm2d, (5, 3, 1, 1), 2, [2, 3]),
        (bn.BatchNorm1d, (10, 3, 2), 3, [3, 3, 3, 1]),
        (bn.BatchNorm2d, (5, 3, 1, 2), 2, [2, 2, 1]),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [None, PassThroughMode], ids=["native", "operators"])
def test_a_last_chunk_of_one_value_a_channel_joins_the_one_before_and_no_other_does(kind, shape, size, sizes, path):
    layer, x = ready(kind, 3, torch.float64, size), normal(shape, 1)
    # No two neighbors are close, which would divide roundings by a small deviation.
    x += 6 * (torch.arange(x[:, 0].numel()) % 2).view_as(x[:, :1])
    x.requires_grad_()
    if path is None:
        found = run(layer, x)
    else:
        with path():
            found = run(layer, x)
    assert_equal(found, expected(layer, x, sizes), torch.float64)
    assert_moved_once_by(layer, x)


@pytest.mark.parametrize(("shape", "sizes"), [((10, 1, 3), [3, 3, 4]), ((10, 2, 3), [3, 3, 3, 1])], ids=str)
def test_channels_at_the_end_make_the_same_chunks(shape, sizes):
    layer = ready(bn.BatchNorm1d, 3, torch.float64, 3, channel_dim=-1)
    x = normal(shape, 1).requires_grad_()
    assert_equal(run(layer, x), expected(layer, x, sizes), torch.float64)


LAYOUTS = {
    "a slice": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_batch_that_is_not_dense_gives_the_same(layout, channel_dim):
    layer = ready(bn.BatchNorm1d, 3, torch.float64, 3, channel_dim=channel_dim)
    x = layout(normal((7, 3, 3), 1)).requires_grad_()
    assert not x.is_contiguous()
    assert_equal(run(layer, x), expected(layer, x, [3, 3, 1]), torch.float64)
    assert_moved_once_by(layer, x)


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}], ids=str)
def test_without_gamma_or_beta_they_are_1_and_0(options):
    layer, x = bn.BatchNorm1d(3, virtual_batch_size=3, **options).double(), normal((7, 3, 2), 1)
    one, zero = torch.ones(3).double(), torch.zeros(3).double()
    assert_equal([layer(x)], [chunk_by_chunk(x, one, zero, [3, 3, 1])], torch.float64)


@pytest.mark.parametrize("options", [{"momentum": None}, {"unbiased": False}], ids=str)
def test_the_one_update_is_that_of_a_layer_without_virtual_batches(options):
    layer, plain = (bn.BatchNorm1d(3, virtual_batch_size=size, **options).double() for size in (3, None))
    for seed in range(3):
        x = normal((8, 3), seed) * (seed + 1)
        layer(x)
        plain(x)
    assert int(layer.num_batches_tracked) == 3
    # float64 moments of eight numbers, pooled in another order
    torch.testing.assert_close(layer.running_mean, plain.running_mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(layer.running_var, plain.running_var, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("path", [None, PassThroughMode], ids=["native", "operators"])
def test_a_chunk_that_is_not_finite_skips_the_update_but_no_other_chunks_output(path):
    layer, x = ready(bn.BatchNorm1d, 3, torch.float64, 4), normal((12, 3), 1)
    x[5, 1] = torch.inf
    if path is None:
        y = layer(x)
    else:
        with path():
            y = layer(x)
    assert layer.running_mean.tolist() == [0.0] * 3
    assert (int(layer.num_batches_tracked), int(layer.skipped_batches)) == (0, 1)
    of_finite = [formula(x[at], layer.weight, layer.bias) for at in (slice(0, 4), slice(8, 12))]
    assert_equal([y[:4], y[8:]], of_finite, torch.float64)


def test_eval_knows_no_virtual_batches():
    layer, plain = (bn.BatchNorm2d(3, virtual_batch_size=size) for size in (2, None))
    plain.load_state_dict(layer.state_dict())
    x = normal((7, 3, 2, 2), 1).float()
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    assert int(layer.num_batches_tracked) == 0


def test_without_running_statistics_eval_uses_those_of_the_whole_batch():
    layer = bn.BatchNorm1d(3, virtual_batch_size=2, track_running_stats=False).double().eval()
    x = normal((7, 3), 1)
    assert_equal([layer(x)], [formula(x, layer.weight, layer.bias)], torch.float64)


@pytest.mark.parametrize("size", [0, 1, -4, 2.0, True])
def test_a_size_below_2_or_not_whole_raises(size):
    with pytest.raises(bn.InputError, match=f"from 2; got {size!r}"):
        bn.BatchNorm1d(3, virtual_batch_size=size)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


MANY = {
    "contiguous": (bn.BatchNorm2d, (201, 8, 16, 16), None),
    "channels last": (bn.BatchNorm2d, (201, 8, 16, 16), LAST),
    "rows": (bn.BatchNorm1d, (1601, 256), None),
    "few channels": (bn.BatchNorm1d, (401, 1, 1024), None),
}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("case", MANY.values(), ids=MANY)
def test_many_small_chunks_on_two_threads(case, masked):
    kind, shape, layout = case
    layer = ready(kind, shape[1], torch.float64, 2, activation="relu")
    x, residual = (laid_out(normal(shape, seed), layout, torch.float64) for seed in (1, 2))
    mask = normal((shape[0], *shape[2:]), 3) < 0.8 if masked else None
    found = run(layer, x, residual=residual, mask=mask)
    wanted = expected(
        layer, x, [2] * (shape[0] // 2 - 1) + ([2, 1] if len(shape) > 2 else [3]), residual=residual, mask=mask
    )
    for one, other in zip(found, wanted, strict=True):
        # x is divided by sqrt(EPS) at least, which makes roundings 300 times as large; sums have up to 410,624 terms
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert_moved_once_by(layer, x, mask)


@pytest.mark.usefixtures("two_threads")
def test_many_small_chunks_in_float32_on_two_threads():
    layer = ready(bn.BatchNorm2d, 8, torch.float32, 2)
    x = laid_out(normal((201, 8, 16, 16), 1) + 5, None, torch.float32)
    assert_equal(run(layer, x), expected(layer, x, [2] * 100 + [1]), torch.float32)
    assert_moved_once_by(layer, x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_second_derivatives_are_those_of_the_formula(activation, masked):
    layer, x = ready(bn.BatchNorm1d, 3, torch.float64, 2, activation=activation), normal((5, 3, 4), 4)
    mask = normal((5, 4), 3) < 0.8 if masked else None
    leaves = [x.requires_grad_(), normal((5, 3, 4), 5).requires_grad_(), *layer.parameters()]

    def derivatives(y):
        first = torch.autograd.grad(y, leaves, normal(y.shape, 9), create_graph=True)
        return [*first, *torch.autograd.grad(sum((g**2).sum() for g in first), leaves, materialize_grads=True)]

    options = {"residual": leaves[1], "mask": mask, "activation": activation}
    wanted = derivatives(chunk_by_chunk(x, *layer.parameters(), [2, 2, 1], **options))
    # sums of sums: some hundred roundings
    for one, other in zip(derivatives(layer(x, leaves[1], mask)), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_operators_give_the_same_as_the_direct_call(case, dtype, activation):
    kind, shape, layout, dim = case
    native, operators = (ready(kind, 3, dtype, 3, activation=activation, channel_dim=dim) for _ in range(2))
    x, residual = (laid_out(normal(shape, seed), layout, dtype) for seed in (1, 2))
    found = run(native, x, residual=residual)
    with PassThroughMode():
        other = run(operators, x, residual=residual)
    # the chunks' parts of dgamma and dbeta are added in another order, and rounded before that
    assert_equal(other, [value.double() for value in found], dtype)
    assert other[0].stride() == found[0].stride()
    torch.testing.assert_close(operators.running_mean, native.running_mean)
    torch.testing.assert_close(operators.running_var, native.running_var)
    assert int(operators.num_batches_tracked) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch itself uses deprecated functions
@pytest.mark.parametrize(
    ("shape", "channel_dim", "masked"), [((7, 3, 2, 3), 1, False), ((10, 3), 1, True), ((7, 5, 3), -1, True)], ids=str
)
def test_a_compiled_layer_in_one_graph_gives_the_same(shape, channel_dim, masked):
    torch._dynamo.reset()
    kind = bn.BatchNorm2d if len(shape) == 4 else bn.BatchNorm1d
    layer, twin = (ready(kind, 3, torch.float64, 3, activation="relu", channel_dim=channel_dim) for _ in range(2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, residual = normal(shape, 1).requires_grad_(), normal(shape, 2).requires_grad_()
    mask = normal(x.movedim(channel_dim, 1)[:, 0].shape, 3) < 0.8 if masked else None
    wanted = run(twin, x, residual=residual, mask=mask)
    y = compiled(x, residual, mask)
    found = [y, *torch.autograd.grad(y, [x, *layer.parameters(), residual], normal(shape, 9))]
    assert_equal(found, wanted, torch.float64)
    assert_moved_once_by(layer, x, mask)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"renorm": bn.Renorm(2.0, 1.0)}], ids=str)
@pytest.mark.parametrize("shape", [(3,), (3, 5)], ids=str)
def test_batches_of_all_sizes_are_five_compilations_at_most(shape, options, masked):
    """Compile for the first size, an open size, and batches of one chunk, of two, and with a last one that joins."""
    torch._dynamo.reset()
    counter = CompileCounter()
    layer, twin = (ready(bn.BatchNorm1d, 3, torch.float64, 4, **options) for _ in range(2))
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for samples in (8, 9, 17, 5, 23, 4, 3, 40, 12, 13, 14, 15):
        x = normal((samples, *shape), samples).requires_grad_()
        mask = normal((samples, *shape[1:]), samples + 1) < 0.8 if masked else None
        assert_equal(run(compiled, x, mask=mask), run(twin, x, mask=mask), torch.float64)
        torch.testing.assert_close(layer.state_dict(), twin.state_dict())
    assert counter.frame_count <= 5
