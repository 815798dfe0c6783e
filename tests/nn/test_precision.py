"""The dtype of the statistics, through casts, half precision and autocast."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import PassThroughMode

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
CASTS = {
    ".half()": lambda layer: layer.half(),
    ".bfloat16()": lambda layer: layer.bfloat16(),
    ".to(torch.bfloat16)": lambda layer: layer.to(torch.bfloat16),
    ".to(torch.float16)": lambda layer: layer.to(dtype=torch.float16),
    ".to('cpu', torch.bfloat16)": lambda layer: layer.to("cpu", torch.bfloat16),
    ".type(torch.bfloat16)": lambda layer: layer.type(torch.bfloat16),
    "a cast of the model around it": lambda layer: nn.Sequential(layer).bfloat16()[0],
    "twice": lambda layer: layer.half().bfloat16(),
}
FINE = 1 + 2.0**-20  # float32 holds it, float16 and bfloat16 round it to 1


def fine_layer(**options):
    layer = bn.BatchNorm1d(3, **options)
    layer.running_mean.fill_(FINE)
    layer.running_var.fill_(FINE)
    return layer


def dtypes(layer):
    return layer.running_mean.dtype, layer.running_var.dtype


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_statistics_come_bitwise_through_a_cast_of_the_layer(cast):
    layer = cast(fine_layer())
    assert layer.weight.dtype in HALVES.values()
    assert dtypes(layer) == (torch.float32, torch.float32)
    assert layer.running_mean.tolist() == layer.running_var.tolist() == [FINE] * 3
    assert layer.num_batches_tracked.dtype == torch.int64


def test_statistics_stay_float32_in_a_cast_to_8_bits():
    layer = fine_layer().to(torch.float8_e4m3fn)
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert dtypes(layer) == (torch.float32, torch.float32)
    assert bool((layer.running_mean == FINE).all())


def test_statistics_come_bitwise_through_a_cast_there_and_back():
    layer = fine_layer().bfloat16().float()
    assert layer.weight.dtype == torch.float32
    assert layer.running_mean.tolist() == layer.running_var.tolist() == [FINE] * 3


def test_a_float64_layer_has_float64_statistics_and_float_brings_float32():
    layer = fine_layer().double()
    assert dtypes(layer) == (torch.float64, torch.float64)
    assert layer.running_var.tolist() == [FINE] * 3
    assert dtypes(layer.float()) == (torch.float32, torch.float32)
    assert layer.running_var.tolist() == [FINE] * 3


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("layer_class", [bn.BatchNorm, bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d])
def test_a_layer_built_in_half_precision_has_float32_statistics(layer_class, dtype):
    layer = layer_class(3, dtype=dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert dtypes(layer) == (torch.float32, torch.float32)


def test_a_layer_built_in_float64_has_float64_statistics():
    assert dtypes(bn.BatchNorm1d(3, dtype=torch.float64)) == (torch.float64, torch.float64)


def test_a_lazy_layer_built_in_half_precision_has_float32_statistics():
    layer = bn.LazyBatchNorm1d(dtype=torch.bfloat16)
    layer(torch.randn(4, 3).bfloat16())
    assert layer.weight.dtype == torch.bfloat16
    assert dtypes(layer) == (torch.float32, torch.float32)


@pytest.mark.parametrize("assign", [False, True])
def test_a_half_precision_state_dict_leaves_the_statistics_float32(assign):
    state = nn.BatchNorm1d(3).bfloat16().state_dict()
    layer = bn.BatchNorm1d(3)
    layer.load_state_dict(state, assign=assign)
    assert dtypes(layer) == (torch.float32, torch.float32)


def test_a_state_dict_of_a_cast_layer_keeps_float32_statistics():
    fresh = bn.BatchNorm1d(3).bfloat16()
    fresh.load_state_dict(fine_layer().bfloat16().state_dict())
    assert fresh.running_mean.tolist() == fresh.running_var.tolist() == [FINE] * 3


def test_a_deepcopy_of_a_cast_layer_keeps_float32_statistics():
    twin = copy.deepcopy(fine_layer().bfloat16())
    assert twin.running_var.tolist() == [FINE] * 3


def test_layers_without_running_statistics_can_be_cast():
    layer = bn.BatchNorm1d(3, track_running_stats=False).bfloat16()
    assert layer(torch.randn(4, 3).bfloat16()).dtype == torch.bfloat16


def test_2000_bfloat16_steps_at_momentum_0_01_end_within_1_percent_of_the_mean():
    layer = bn.BatchNorm1d(3, momentum=0.01).bfloat16()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        layer((torch.randn(32, 3, generator=generator) + 10).bfloat16())
    # 1 - 0.99^2000 is 1 within 2e-9; the mean of about 200 batches of 32 has a deviation of 1 / 80, 0.13% of 10.
    assert (layer.running_mean - 10).abs().max() < 0.1
    # The variance's deviation is sqrt(2 / 6400), 1.8%; rounding to bfloat16 near 10 (steps of 1/16) adds 3e-4.
    assert (layer.running_var - 1).abs().max() < 0.1


@pytest.mark.parametrize("shape", [(16, 3), (8, 3, 5), (4, 3, 5, 2)], ids=str)
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_half_precision_input_is_normalized_and_learned_from_as_its_float64_values(dtype, shape):
    layer = bn.BatchNorm(3).to(dtype)
    x = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 2).to(dtype)
    y = layer(x)
    wide = x.double().movedim(1, 0).flatten(1)
    around = [3, *(1 for _ in shape[2:])]
    mean, var = wide.mean(1).view(around), wide.var(1, correction=0).view(around)
    assert y.dtype == dtype
    # y is rounded once to its dtype: half a unit in the last place, relative.
    torch.testing.assert_close(
        y.double(), (x.double() - mean) / (var + 1e-5).sqrt(), rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5
    )
    # Statistics are float32: 2^-24 relative, and as much again for the product with momentum.
    torch.testing.assert_close(layer.running_mean.double(), 0.1 * wide.mean(1), rtol=2e-7, atol=1e-7)
    torch.testing.assert_close(layer.running_var.double(), 0.9 + 0.1 * wide.var(1), rtol=2e-7, atol=1e-7)


def test_gradients_of_a_cast_layer_have_the_dtypes_of_what_they_are_of():
    layer, x = bn.BatchNorm1d(3).bfloat16(), torch.randn(8, 3).bfloat16().requires_grad_()
    layer(x).float().square().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("of_layer", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_input", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_dtype_and_numbers_are_torchs(of_input, of_layer, training):
    x = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0)).to(of_input)
    outputs = []
    for kind in (bn.BatchNorm1d, nn.BatchNorm1d):
        layer = kind(3).to(of_layer).train(training)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                outputs.append(layer(x))
        except RuntimeError:
            assert kind is nn.BatchNorm1d  # torch's refuses float32 input to a bfloat16 layer
            return
    ours, theirs = outputs
    assert ours.dtype == theirs.dtype
    # Values below 4: torch's may be off by a unit in the last place of its dtype, 2^-7 or 2^-23 relative.
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=2 * eps, atol=4 * eps)


@pytest.mark.parametrize("norm", [bn.BatchNorm1d, nn.BatchNorm1d])
def test_a_network_under_autocast_gives_bfloat16_between_its_layers(norm):
    model = nn.Sequential(nn.Linear(4, 3), norm(3))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(8, 4))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert model[0].weight.grad.dtype == torch.float32
    assert model[1].running_mean.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layer_class", [bn.BatchNorm1d, bn.BatchNorm])
def test_float64_input_to_a_float32_layer_gets_the_float64_answer(layer_class, training):
    layer = layer_class(3).train(training)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.5, -2.0]))
        layer.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    layer.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
    x = 1000 + torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = x.mean(0) if training else layer.running_mean.double()
    var = x.var(0, correction=0) if training else layer.running_var.double()
    expected = layer.weight.double() * (x - mean) / torch.sqrt(var + 1e-5) + layer.bias.double()
    y = layer(x)
    assert y.dtype == torch.float64
    # float64 rounds 1000 by 1e-13, times gains of 2 and 2000 / 1.
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert dtypes(layer) == (torch.float32, torch.float32)


def test_gradients_of_float64_input_to_a_float32_layer_are_those_of_the_formula():
    layer = bn.BatchNorm1d(3)
    x = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    dy = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer(x).backward(dy)
    x_hat = (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + 1e-5)
    (expected,) = torch.autograd.grad(x_hat, x, dy)
    # float64: sums of 16 numbers below 4 round by 16 * 1e-16 * 4.
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-13)
    assert layer.weight.grad.dtype == torch.float32


def test_float32_input_to_a_float64_layer_keeps_its_dtype():
    layer = bn.BatchNorm1d(3).double()
    assert layer(torch.randn(8, 3)).dtype == torch.float32
    assert dtypes(layer) == (torch.float64, torch.float64)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_of_a_float64_layer_have_its_precision_through_the_operators(momentum, masked):
    direct, dispatched = (bn.BatchNorm1d(3, momentum=momentum).double() for _ in range(2))
    for seed in range(4):
        x = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 5
        mask = torch.arange(7) < 6 if masked else None
        direct(x, mask=mask)
        with PassThroughMode():
            dispatched(x, mask=mask)
    # some roundings of numbers of order 10
    torch.testing.assert_close(dispatched.state_dict(), direct.state_dict(), rtol=1e-14, atol=1e-14)


def test_integers_are_refused_by_their_dtype():
    with pytest.raises(bn.InputError, match=r"floating dtype; got torch\.int64"):
        bn.BatchNorm1d(3)(torch.ones(4, 3, dtype=torch.int64))


def test_shared_memory_keeps_the_statistics_and_the_layer_trains_on():
    layer = fine_layer().bfloat16().share_memory()
    assert all(values.is_shared() for values in layer.state_dict().values())
    assert layer.running_var.tolist() == [FINE] * 3
    at = layer.running_mean.data_ptr()
    layer(torch.randn(8, 3).bfloat16())
    assert layer.running_mean.data_ptr() == at
    assert layer.running_mean.is_shared()
    assert layer.running_mean[0] != FINE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_on_meta_has_float32_statistics_and_shapes_and_comes_back_empty(dtype):
    layer = bn.BatchNorm1d(3).to("meta", dtype)
    assert {buffer.device.type for buffer in layer.buffers()} == {"meta"}
    assert dtypes(layer) == (torch.float32, torch.float32)
    assert layer(torch.empty(8, 3, device="meta", dtype=dtype)).shape == (8, 3)
    layer = layer.to_empty(device="cpu")
    assert int(layer.skipped_batches) == 0
    layer.load_state_dict(fine_layer().state_dict())
    assert layer.running_mean.tolist() == [FINE] * 3


def test_a_layer_built_on_meta_loads_a_state_by_assignment():
    layer = bn.BatchNorm1d(3, device="meta", dtype=torch.bfloat16)
    layer.load_state_dict(fine_layer().bfloat16().state_dict(), assign=True)
    assert layer.running_var.tolist() == [FINE] * 3


# Casts out of the layer's sight, as by FSDP1: ``buffer.data = buffer.bfloat16()``.


def cast_data(layer, dtype=torch.bfloat16):
    for buffer in layer.buffers():
        buffer.data = buffer.to(dtype) if buffer.is_floating_point() else buffer.clone()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("copied", [lambda layer: layer, copy.deepcopy], ids=["itself", "a copy"])
def test_a_cast_of_the_data_is_taken_back_without_loss_at_the_next_forward(copied, training):
    layer, twin, x = copied(fine_layer()), fine_layer(), torch.randn(8, 3)
    for _ in range(3):
        before = list(layer.buffers())
        cast_data(layer)
        assert torch.equal(layer.train(training)(x), twin.train(training)(x))
        assert all(new is old for new, old in zip(layer.buffers(), before, strict=True))
    assert dtypes(layer) == (torch.float32, torch.float32)
    assert layer.running_mean.tolist() == twin.running_mean.tolist()


def test_the_statistics_of_a_domain_come_back_too():
    layer = bn.add_domains(fine_layer(), ["real"])
    layer.running_mean = torch.zeros(3)
    cast_data(layer)
    layer.eval()(torch.randn(8, 3))
    assert layer.running_mean_real.tolist() == [FINE] * 3
    assert layer.running_mean.tolist() == [0.0] * 3


def test_data_that_were_set_since_are_not_taken_back():
    layer = fine_layer()
    layer.running_mean.data = torch.tensor([1.5, 2.5, FINE])
    cast_data(layer)
    layer.eval()(torch.randn(8, 3))
    assert layer.running_mean.tolist() == [1.5, 2.5, 1.0]
    assert layer.running_var.tolist() == [FINE] * 3


def test_buffers_that_were_replaced_by_half_precision_are_float32_from_the_next_forward():
    layer = fine_layer()
    for name in ("running_mean", "running_var"):
        layer._buffers[name] = torch.full((3,), 2.0, dtype=torch.float16)  # accelerate's loading with dtype= does this
    layer(torch.randn(8, 3))
    assert dtypes(layer) == (torch.float32, torch.float32)


def test_half_precision_buffers_of_a_functional_call_stay_the_callers():
    layer = fine_layer()
    given = {"running_mean": torch.zeros(3).bfloat16(), "running_var": torch.ones(3).bfloat16()}
    mean = given["running_mean"]
    torch.func.functional_call(layer, given, (torch.randn(8, 3) + 5,))
    assert mean.dtype == torch.bfloat16
    assert mean.abs().min() > 0
    assert layer.running_mean.tolist() == [FINE] * 3
