"""Padded batches: a layer with a mask equals a layer that sees only the values that count."""

import contextlib
import itertools
import math

import pytest
import torch

import batchnorm as bn
from support import PassThroughMode

C = 5
# Shape of the input, dimension of the channels, memory format.
LAYOUTS = {
    "(N, C)": ((23, C), 1, torch.contiguous_format),
    "(N, C, L)": ((4, C, 9), 1, torch.contiguous_format),
    "(N, C, H, W)": ((4, C, 3, 5), 1, torch.contiguous_format),
    "(N, H, W, C) in memory": ((4, C, 3, 5), 1, torch.channels_last),
    "(N, L, C)": ((4, 9, C), -1, torch.contiguous_format),
    "(N, C, L) permuted": ((4, 9, C), -1, None),
}
PADS = [0.0, 1e6, math.nan]
DTYPES = [torch.float32, torch.bfloat16]
# Products of size 10 at most, 100 of them summed in float32: 100 x 10 x 2**-24 = 6e-5. Half precision rounds what it
# stores by 2**-9 of it.
TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 6e-5}, torch.bfloat16: {"rtol": 2**-8, "atol": 6e-5}}


# "reference": a residual of another dtype than the input, which the native kernels do not support.
WAYS = {"native": contextlib.nullcontext, "dispatched": PassThroughMode, "reference": contextlib.nullcontext}


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def channels_last(x, dim):
    return x.movedim(dim, -1)


def padded(x, mask, dim, pad):
    return torch.where(mask.unsqueeze(dim), x, pad)


def laid_out(x, memory_format):
    if memory_format is None:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous(memory_format=memory_format)


def mask_of(shape, dim, seed=7):
    positions = list(shape)
    del positions[dim]
    return torch.rand(positions, generator=torch.Generator().manual_seed(seed)) > 0.3


def prepared(layer):
    """Return the layer with gamma, beta and running statistics other than the initial ones."""
    with torch.no_grad():
        for values, seed in ((layer.weight, 1), (layer.bias, 2), (layer.running_mean, 3)):
            values.copy_(numbers(C, seed=seed))
        layer.running_var.copy_(1 + numbers(C, seed=4).square())
    return layer


def step(layer, x, residual, mask, dy):
    """Return y, its gradients, and the running statistics afterwards."""
    leaves = [values.detach().requires_grad_() for values in (x, residual)]
    y = layer(*leaves, mask)
    gradients = torch.autograd.grad(y, [*leaves, layer.weight, layer.bias], dy.to(y.dtype))
    names = ("input", "residual", "gamma", "beta")
    found = dict(zip(names, gradients, strict=True)) | {"y": y.detach()}
    return found | {"running mean": layer.running_mean, "running var": layer.running_var}


def compacted_step(layer, x, residual, mask, dy, dim, activation):
    """Do the same with torch's own layer in float64, on the values that count, gathered into (M, C)."""
    twin = torch.nn.BatchNorm1d(C, momentum=layer.momentum).double().train(layer.training)
    twin.load_state_dict(layer.state_dict())
    rows = [channels_last(values, dim)[mask].double() for values in (x, residual, dy)]
    leaves = [values.requires_grad_() for values in rows[:2]]
    y = activation(twin(leaves[0]) + leaves[1])
    gradients = torch.autograd.grad(y, [*leaves, twin.weight, twin.bias], rows[2])
    found = dict(zip(("input", "residual", "gamma", "beta"), gradients, strict=True)) | {"y": y.detach()}
    return found | {"running mean": twin.running_mean, "running var": twin.running_var}


def check_against_compacted(layout, dtype, way, pad, *, training):
    shape, dim, memory_format = LAYOUTS[layout]
    mask = mask_of(shape, dim)
    layer = prepared(bn.BatchNorm(C, momentum=0.25, activation="leaky_relu", channel_dim=dim)).to(dtype)
    layer.train(training)
    x, residual, dy = (numbers(*shape, seed=seed).to(dtype) for seed in (10, 11, 12))
    expected = compacted_step(layer, 2 * x + 1, residual, mask, dy, dim, torch.nn.functional.leaky_relu)
    x, residual, dy = (laid_out(padded(values, mask, dim, pad), memory_format) for values in (2 * x + 1, residual, dy))
    residual = residual.double() if way == "reference" else residual
    with WAYS[way]():
        found = step(layer, x, residual, mask, dy)
    for name, theirs in expected.items():
        ours = found[name]
        if name in ("y", "input", "residual"):
            assert not channels_last(ours, dim)[~mask].any(), name
            ours = channels_last(ours, dim)[mask]
        torch.testing.assert_close(ours.double(), theirs, **TOLERANCES[dtype], msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_padded_batch_trains_as_the_values_that_count_alone(layout, dtype, pad, way):
    check_against_compacted(layout, dtype, way, pad, training=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_eval_of_a_padded_batch_is_that_of_the_values_that_count_alone(layout, dtype, pad, way):
    check_against_compacted(layout, dtype, way, pad, training=False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid", None])
def test_y_and_gradients_are_zero_at_padding_whatever_the_activation_gives_at_zero(activation, training):
    layer, mask = prepared(bn.BatchNorm1d(C, activation=activation)).train(training), mask_of((4, C, 9), 1)
    x, residual, dy = (padded(numbers(4, C, 9, seed=seed), mask, 1, math.nan) for seed in range(3))
    found = step(layer, x, residual, mask, dy)
    for name in ("y", "input", "residual"):
        assert not found[name].movedim(1, -1)[~mask].any(), name
        assert found[name].movedim(1, -1)[mask].all() or activation == "relu", name
    assert all(values.isfinite().all() for values in found.values())


@pytest.mark.parametrize("way", ["native", "dispatched"])
@pytest.mark.parametrize("activation", [None, "relu", "sigmoid"])
def test_a_mask_of_true_alone_is_no_mask(activation, way):
    x, residual, dy = (numbers(4, C, 9, seed=seed) for seed in range(3))
    one, other = (prepared(bn.BatchNorm1d(C, activation=activation)) for _ in range(2))
    with WAYS[way]():
        masked = step(one, x, residual, torch.ones(4, 9, dtype=torch.bool), dy)
        plain = step(other, x, residual, None, dy)
    for name, values in plain.items():
        torch.testing.assert_close(masked[name], values, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("at", ["sample", "position"])
def test_a_sample_or_position_that_is_padding_alone_is_as_if_left_out(at):
    x, residual, dy = (numbers(4, C, 9, seed=seed) for seed in range(3))
    mask, left_out = torch.ones(4, 9, dtype=torch.bool), (1, 0) if at == "sample" else (3, 2)
    mask[left_out[0] if at == "sample" else (slice(None), left_out[0])] = False
    kept = [i for i in range(x.shape[left_out[1]]) if i != left_out[0]]
    one, other = (prepared(bn.BatchNorm1d(C)) for _ in range(2))
    masked = step(one, x, residual, mask, dy)
    without = step(
        other,
        *(values.index_select(left_out[1], torch.tensor(kept)) for values in (x, residual)),
        None,
        dy.index_select(left_out[1], torch.tensor(kept)),
    )
    for name, values in without.items():
        ours = masked[name]
        if ours.dim() == 3:
            ours = ours.index_select(left_out[1], torch.tensor(kept))
        torch.testing.assert_close(ours, values, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("pad", PADS)
def test_a_batch_of_padding_alone_is_as_an_empty_batch(pad, momentum, way):
    one, other = (prepared(bn.BatchNorm1d(C, momentum=momentum, activation="sigmoid")) for _ in range(2))
    mean, var = one.running_mean.clone(), one.running_var.clone()
    x = torch.full((4, C, 9), pad)
    with WAYS[way]():
        found = step(one, x, x.double() if way == "reference" else x, torch.zeros(4, 9, dtype=torch.bool), x)
        other(x[:0])
    assert torch.equal(one.running_mean, mean)
    assert torch.equal(one.running_var, var)
    assert one.num_batches_tracked == other.num_batches_tracked
    assert one.skipped_batches == other.skipped_batches == 0
    for name in ("y", "input", "residual", "gamma", "beta"):
        assert not found[name].any(), name


def test_a_virtual_batch_of_padding_alone_is_as_if_left_out():
    x, mask = numbers(6, C, 4), torch.ones(6, 4, dtype=torch.bool)
    mask[2:4] = False
    one, other = (bn.BatchNorm1d(C, virtual_batch_size=2) for _ in range(2))
    kept = torch.tensor([0, 1, 4, 5])
    y = one(padded(x, mask, 1, math.nan), None, mask)
    assert not y[2:4].any()
    torch.testing.assert_close(y[kept], other(x[kept]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.running_mean, other.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.running_var, other.running_var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["native", "dispatched"])
def test_a_single_value_that_counts_gives_beta_and_moves_no_statistics(way):
    layer, mask = prepared(bn.BatchNorm1d(C)), torch.zeros(4, 9, dtype=torch.bool)
    mask[1, 3] = True
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    with WAYS[way]():
        y = layer(padded(numbers(4, C, 9), mask, 1, math.nan), None, mask)
    assert torch.equal(y[1, :, 3], layer.bias)
    assert torch.equal(layer.running_mean, mean)
    assert torch.equal(layer.running_var, var)


@pytest.mark.parametrize("sizes", [*itertools.product((1, 4), (1, 3), (1, 2))], ids=str)
@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("way", ["native", "dispatched"])
def test_a_mask_of_size_1_dimensions_counts_as_the_expanded_one(way, dim, sizes):
    mask = torch.rand(sizes, generator=torch.Generator().manual_seed(3)) > 0.4
    mask.view(-1)[0] = True
    shape = (4, C, 3, 2) if dim == 1 else (4, 3, 2, C)
    x, residual, dy = (numbers(*shape, seed=seed) for seed in range(3))
    one, other = (prepared(bn.BatchNorm(C, channel_dim=dim, activation="relu")) for _ in range(2))
    with WAYS[way]():
        broadcast = step(one, x, residual, mask, dy)
    expanded = step(other, x, residual, mask.expand(4, 3, 2).contiguous(), dy)
    for name, values in expanded.items():
        torch.testing.assert_close(broadcast[name], values, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("size", [2, 3])
def test_a_broadcast_mask_serves_every_virtual_batch(size):
    x, mask = numbers(7, C, 4), torch.tensor([[True, False, True, True]])
    one, other = (bn.BatchNorm1d(C, virtual_batch_size=size) for _ in range(2))
    torch.testing.assert_close(one(x, None, mask)[..., mask[0]], other(x[..., mask[0]]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.running_var, other.running_var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_padding_makes_no_skipped_batch_and_a_value_that_counts_does(bad, way):
    layer, mask = prepared(bn.BatchNorm1d(C)), mask_of((4, C, 9), 1)
    x = padded(numbers(4, C, 9), mask, 1, bad)
    residual = torch.zeros(4, C, 9, dtype=torch.float64 if way == "reference" else torch.float32)
    with WAYS[way]():
        layer(x, residual, mask)
    assert (int(layer.skipped_batches), int(layer.num_batches_tracked)) == (0, 1)
    mean = layer.running_mean.clone()
    with WAYS[way]():
        layer(x, residual, None)
    assert (int(layer.skipped_batches), int(layer.num_batches_tracked)) == (1, 1)
    assert torch.equal(layer.running_mean, mean)


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize(
    "mask", [torch.ones(4, 9), torch.ones(4, 8, dtype=torch.bool), torch.ones(4, C, 9, dtype=torch.bool)], ids=str
)
def test_a_mask_that_does_not_fit_is_refused(mask, dim):
    layer = bn.BatchNorm1d(C, channel_dim=dim)
    with pytest.raises(bn.InputError, match=r"mask must be bool and of shape \(4, 9\)"):
        layer(torch.zeros(4, C, 9) if dim == 1 else torch.zeros(4, 9, C), None, mask)


def test_lengths_that_are_no_tensor_are_refused_by_their_type():
    with pytest.raises(bn.InputTypeError, match="lengths must be a tensor of whole numbers; got list"):
        bn.lengths_to_mask([1, 2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_lengths_make_a_mask_that_begins_with_so_many_true(dtype):
    mask = bn.lengths_to_mask(torch.tensor([0, 2, 4], dtype=dtype), 5)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[False] * 5, [True, True, False, False, False], [True] * 4 + [False]]


def test_without_a_size_the_mask_is_as_long_as_the_longest():
    assert bn.lengths_to_mask(torch.tensor([1, 3])).shape == (2, 3)
    assert bn.lengths_to_mask(torch.tensor([0, 0])).shape == (2, 0)
    assert bn.lengths_to_mask(torch.tensor([], dtype=torch.int64)).shape == (0, 0)
    assert bn.lengths_to_mask(torch.tensor([], dtype=torch.int64), 4).shape == (0, 4)


@pytest.mark.parametrize("dim", [1, -1])
def test_sequences_of_several_lengths_have_the_statistics_of_their_values(dim):
    lengths = [3, 7, 1]
    parts = [numbers(length, C, seed=length) for length in lengths]
    x = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=math.nan)
    layer = bn.BatchNorm1d(C, momentum=None, channel_dim=dim)
    layer(x if dim == -1 else x.transpose(1, 2), None, bn.lengths_to_mask(torch.tensor(lengths)))
    together = torch.cat(parts).double()
    torch.testing.assert_close(layer.running_mean.double(), together.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), together.var(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("lengths", "size", "message"),
    [
        (torch.tensor([[1, 2]]), None, r"shape \(N,\); got torch.int64 \(1, 2\)"),
        (torch.tensor(3), None, r"shape \(N,\); got torch.int64 \(\)"),
        (torch.tensor([1.0]), None, r"whole numbers .*; got torch.float32"),
        (torch.tensor([True]), None, r"whole numbers .*; got torch.bool"),
        (torch.tensor([2, -1]), None, r"lengths must be at least 0; got -1"),
        (torch.tensor([2, 6]), 5, r"at most size=5; got 6"),
    ],
)
def test_lengths_that_make_no_mask_are_refused(lengths, size, message):
    with pytest.raises(bn.InputError, match=message):
        bn.lengths_to_mask(lengths, size)
