"""Batches with an infinity or a NaN: they do not change the statistics, and give torch's outputs."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import batchnorm as bn
from batchnorm.kernels.chosen import cpu_kernel
from support import PassThroughMode

LAYOUTS = {
    "(N, C)": (bn.BatchNorm1d, nn.BatchNorm1d, (6, 5), torch.contiguous_format),
    "(N, C, L)": (bn.BatchNorm1d, nn.BatchNorm1d, (4, 5, 7), torch.contiguous_format),
    "(N, C, H, W)": (bn.BatchNorm2d, nn.BatchNorm2d, (4, 5, 3, 2), torch.contiguous_format),
    "channels last": (bn.BatchNorm2d, nn.BatchNorm2d, (4, 5, 3, 2), torch.channels_last),
    "channels last 3d": (bn.BatchNorm3d, nn.BatchNorm3d, (3, 5, 2, 3, 2), torch.channels_last_3d),
}
POISONS = {"inf": math.inf, "-inf": -math.inf, "NaN": math.nan}


def directly(layer, x):
    assert cpu_kernel() == "native"
    return layer(x)


def dispatched(layer, x):
    with PassThroughMode():
        return layer(x)


PATHS = {"native": directly, "dispatched": dispatched}


@pytest.fixture(params=PATHS.values(), ids=PATHS)
def path(request):
    return request.param


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request):
    return request.param


def batch(shape, kind=torch.contiguous_format, seed=0):
    values = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 1
    return values.contiguous(memory_format=kind)


def poisoned(shape, kind=torch.contiguous_format, value=math.nan, channel=3):
    """Return a batch in which one value of one channel is infinite or NaN."""
    x = batch(shape, kind, seed=9)
    x[(1, channel, *(-1 for _ in shape[2:]))] = value
    return x


def state(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def unmoved(before, layer):
    return all(torch.equal(value, layer.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1e-3, None], ids=str)
@pytest.mark.parametrize("value", POISONS.values(), ids=POISONS)
def test_a_bad_value_leaves_statistics_and_count_bitwise_as_they_were(layout, value, momentum, path):
    ours, _, shape, kind = layout
    layer = ours(5, momentum=momentum)
    for seed in range(2):
        path(layer, batch(shape, kind, seed))
    before = state(layer)
    path(layer, poisoned(shape, kind, value))
    assert unmoved(before, layer)
    assert int(layer.num_batches_tracked) == 2


@pytest.mark.parametrize("channel", [0, 2, 4])
def test_wherever_the_bad_channel_stands_none_moves(layout, channel, path):
    ours, _, shape, kind = layout
    layer = ours(5)
    path(layer, poisoned(shape, kind, channel=channel))
    assert torch.equal(layer.running_mean, torch.zeros(5))
    assert torch.equal(layer.running_var, torch.ones(5))


def test_skipped_batches_counts_them_and_no_others(path):
    layer = bn.BatchNorm1d(5)
    for x in (batch((6, 5)), poisoned((6, 5)), poisoned((6, 5), value=math.inf), batch((6, 5), seed=1)):
        path(layer, x)
    assert (int(layer.skipped_batches), int(layer.num_batches_tracked)) == (2, 2)
    layer.eval()
    path(layer, poisoned((6, 5)))
    assert int(layer.skipped_batches) == 2


@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
def test_the_statistics_are_those_of_the_good_batches_alone(layout, momentum, path):
    ours, theirs, shape, kind = layout
    layer, stock = ours(5, momentum=momentum), theirs(5, momentum=momentum)
    for seed in range(4):
        path(layer, batch(shape, kind, seed))
        path(layer, poisoned(shape, kind))
        stock(batch(shape, kind, seed))
    for name, value in stock.state_dict().items():
        # Both sum at most 28 float32 values below 60: a few roundings of 6e-8 relative.
        torch.testing.assert_close(layer.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_the_count_of_skipped_batches_is_in_no_state_dict_and_moves_with_the_layer():
    layer = bn.BatchNorm1d(5)
    layer(poisoned((6, 5)))
    assert "skipped_batches" not in layer.state_dict()
    assert layer.skipped_batches.dtype == torch.int64
    assert int(layer.double().skipped_batches) == 1
    layer.reset_running_stats()
    assert int(layer.skipped_batches) == 0


@pytest.mark.parametrize("value", POISONS.values(), ids=POISONS)
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_y_and_the_gradient_of_a_bad_batch_are_torchs(layout, value, nonfinite, path):
    ours, theirs, shape, kind = layout
    x, results = poisoned(shape, kind, value), []
    for layer, run in ((ours(5, nonfinite=nonfinite), path), (theirs(5), directly)):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = run(layer, leaf)
        y.backward(batch(shape, kind, seed=4))
        results.append((y.detach(), leaf.grad))
    good = [0, 1, 2, 4]
    for one, other in zip(*results, strict=True):
        # Few float32 values below 10 a channel: some roundings of 6e-8 times 10.
        torch.testing.assert_close(one[:, good], other[:, good], rtol=1e-5, atol=2e-6)
        assert torch.equal(one.isnan(), other.isnan())
        assert one[:, 3].isnan().all()


def test_relu_of_a_bad_channel_is_nan(path):
    layer = bn.BatchNorm1d(5, activation="relu")
    y = path(layer, poisoned((6, 5)))
    assert y[:, 3].isnan().all()
    assert y[:, [0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
@pytest.mark.parametrize("value", POISONS.values(), ids=POISONS)
def test_under_propagate_the_statistics_become_torchs(layout, value, momentum, path):
    ours, theirs, shape, kind = layout
    layer, stock = ours(5, momentum=momentum, nonfinite="propagate"), theirs(5, momentum=momentum)
    path(layer, poisoned(shape, kind, value))
    stock(poisoned(shape, kind, value))
    assert int(layer.num_batches_tracked) == 1
    assert layer.skipped_batches is None
    assert not layer.running_mean[3].isfinite()
    for name in ("running_mean", "running_var"):
        ours_now, theirs_now = getattr(layer, name), getattr(stock, name)
        # At most 36 float32 values below 60: a few roundings of 6e-8 relative.
        torch.testing.assert_close(ours_now, theirs_now, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_skip_too(layout, dtype, path):
    ours, _, shape, kind = layout
    layer = ours(5).to(dtype)
    path(layer, batch(shape, kind).to(dtype))
    before = state(layer)
    path(layer, poisoned(shape, kind, math.inf).to(dtype))
    assert unmoved(before, layer)
    assert int(layer.skipped_batches) == 1


@pytest.mark.parametrize("options", [{"virtual_batch_size": 2}, {"renorm": bn.Renorm(3.0, 5.0)}], ids=str)
def test_virtual_batches_and_renormalization_skip_too(options, path):
    layer = bn.BatchNorm1d(5, **options)
    path(layer, batch((6, 5)))
    before = state(layer)
    path(layer, poisoned((6, 5)))
    assert unmoved(before, layer)
    assert int(layer.skipped_batches) == 1


# Variances beyond the range of float32.


@pytest.mark.parametrize("scale", [1e25, 1e30], ids=str)
def test_values_whose_variance_overflows_are_skipped_and_y_is_right(layout, scale, path):
    ours, _, shape, kind = layout
    layer, x = ours(5), batch(shape, kind, seed=9)
    x[:, 3] *= scale
    before = state(layer)
    y = path(layer, x).double()
    wide = x.double().movedim(1, 0).flatten(1)
    around = [5, *(1 for _ in shape[2:])]
    mean, var = wide.mean(1).view(around), wide.var(1, correction=0).view(around)
    # x_hat is below 6; each of a few float32 operations on it rounds by 6e-8.
    torch.testing.assert_close(y.detach(), (x.double() - mean) / torch.sqrt(var + 1e-5), rtol=0, atol=2e-6)
    assert unmoved(before, layer)
    assert int(layer.skipped_batches) == 1


def test_the_gradient_of_values_whose_variance_overflows_is_right_too(path):
    x = (1e30 * batch((8, 5))).requires_grad_()
    dy = batch((8, 5), seed=1)
    (slope,) = torch.autograd.grad(path(bn.BatchNorm1d(5), x), x, dy)
    wide = x.detach().double().requires_grad_()
    x_hat = (wide - wide.mean(0)) / torch.sqrt(wide.var(0, correction=0) + 1e-5)
    (expected,) = torch.autograd.grad(x_hat, wide, dy.double())
    # In units of 1e-30: sums of 8 float32 terms below 10 round by 8 * 6e-8 * 10.
    torch.testing.assert_close(slope.double() * 1e30, expected * 1e30, rtol=0, atol=5e-6)


def test_a_float64_layer_moves_by_a_variance_that_float64_holds(path):
    layer, x = bn.BatchNorm1d(5, dtype=torch.float64, momentum=1e-3), 1e30 * batch((8, 5)).double()
    path(layer, x)
    # A few float64 roundings of 1e-16, relative.
    torch.testing.assert_close(layer.running_var, 0.999 + 1e-3 * x.var(0), rtol=1e-12, atol=0)
    assert int(layer.skipped_batches) == 0


def test_large_values_that_float32_can_square_are_learned_from(path):
    layer, x = bn.BatchNorm1d(5), 1e15 * batch((8, 5))
    path(layer, x)
    # Float32 keeps 7 digits.
    torch.testing.assert_close(layer.running_var.double(), 0.9 + 0.1 * x.double().var(0), rtol=1e-6, atol=0)


# With the loss scaler of mixed precision.


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), bn.BatchNorm1d(5), nn.Linear(5, 1))


def scaled_step(model, optimizer, scaler, x):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    if scaler is None:
        loss.backward()
        if all(parameter.grad.isfinite().all() for parameter in model.parameters()):
            optimizer.step()
        return
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("scaler", [None, "GradScaler"])
def test_a_training_with_a_bad_batch_ends_as_the_one_without_it(scaler):
    ended = []
    for bad in (True, False):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaling = None if scaler is None else torch.amp.GradScaler("cpu", init_scale=1024.0)
        for seed in range(5):
            if bad and seed == 2:
                scaled_step(model, optimizer, scaling, poisoned((6, 4)))
            scaled_step(model, optimizer, scaling, batch((6, 4), seed=seed))
        ended.append((model.state_dict(), int(model[1].skipped_batches), scaling))
    (one, skipped, scaling), (other, none, _) = ended
    for name, value in other.items():
        # Bitwise: the scale, halved by the bad step, is a power of 2.
        assert torch.equal(one[name], value)
    assert (skipped, none) == (1, 0)
    assert scaling is None or scaling.get_scale() == 512.0


def test_an_overflow_of_the_loss_scale_alone_is_no_bad_batch():
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch.no_grad():
        model[2].weight.mul_(100)
    before = model[0].weight.detach().clone()
    scaled_step(model, optimizer, scaler, batch((6, 4)))
    assert torch.equal(model[0].weight, before)
    assert (int(model[1].skipped_batches), int(model[1].num_batches_tracked)) == (0, 1)


# Nothing waits for the device: the decision is taken without reading a value.


@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_no_value_is_read_under_fake_tensors(layout, nonfinite, momentum):
    ours, _, shape, _ = layout
    with FakeTensorMode():
        layer = ours(5, nonfinite=nonfinite, momentum=momentum)
        x = torch.empty(shape, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == shape


@pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning"
)  # torch itself reads it
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"nonfinite": "propagate"}, {"renorm": bn.RenormSchedule(start=1, r_end=5, d_end=5)}],
    ids=str,
)
def test_compiled_as_one_graph_it_skips_and_counts_as_eager_does(options):
    torch._dynamo.reset()
    eager, layer = bn.BatchNorm1d(5, **options), bn.BatchNorm1d(5, **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (batch((6, 5)), poisoned((6, 5)), batch((6, 5), seed=1)):
        # Few float32 values below 10 a channel: some roundings of 6e-8 times 10.
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=2e-6, equal_nan=True)
    for (name, ours), theirs in zip(layer.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True, msg=name)
    assert int(layer.num_batches_tracked) == (3 if "nonfinite" in options else 2)
