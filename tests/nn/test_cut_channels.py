"""Layers whose tensors are cut to fewer channels by hand or by a tool, with num_features as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import batchnorm as bn
from support import assert_same_buffers, copied_buffers, randn

# Sums of 40 float32 values of order 5, in another order: off by a few roundings of 6e-8.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KEPT = torch.tensor([0, 2, 5])


def cut(layer, names=("weight", "bias", "running_mean", "running_var")):
    """Keep some channels of each tensor, as a script for structured pruning does."""
    for name in names:
        values = getattr(layer, name)
        setattr(layer, name, nn.Parameter(values.data[KEPT]) if name in layer._parameters else values[KEPT])
    return layer


def trained(of, **options):
    layer = of.BatchNorm2d(6, **options)
    layer(randn(5, 6, 4, 2) * 2 + 1)
    return layer


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_layer_cut_by_hand_gives_what_torchs_layer_gives(mode):
    x, found = randn(5, 6, 4, 2, seed=1)[:, KEPT], []
    for of in (bn, nn):
        layer = cut(trained(of)).train(mode)
        for _ in range(2):  # the second call is planned
            y = layer(x)
        y.square().sum().backward()
        found.append([y, layer.weight.grad, layer.running_mean, layer.running_var])
    torch.testing.assert_close(*found, **CLOSE)


OPTIONS = [
    {"activation": "relu"},
    {"virtual_batch_size": 2},
    {"renorm": bn.Renorm(3.0, 3.0)},
    {"small_batch": "running"},
    {"affine": False},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_cut_layer_with_options_equals_a_layer_of_its_size(options):
    names = [name for name in ("weight", "bias") if options.get("affine", True)]
    layer = cut(bn.BatchNorm2d(6, **options), (*names, "running_mean", "running_var"))
    small, x = bn.BatchNorm2d(3, **options), randn(5, 3, 4, 2)
    assert torch.equal(layer(x), small(x))
    assert_same_buffers(layer, copied_buffers(small))


def test_a_layer_without_tensors_takes_any_number_of_channels_as_torchs():
    layers = [of.BatchNorm1d(6, affine=False, track_running_stats=False) for of in (bn, nn)]
    torch.testing.assert_close(*(layer(randn(4, 3, 2)) for layer in layers), **CLOSE)


def test_one_value_per_channel_of_a_cut_layer_is_refused():
    with pytest.raises(bn.InputError, match="more than 1 value per channel"):
        cut(bn.BatchNorm1d(6))(randn(1, 3))


def test_tensors_of_unlike_sizes_are_named():
    layer = cut(bn.BatchNorm1d(6), ["weight", "bias"])
    with pytest.raises(bn.InputError, match="running_mean must have one number for each of the input's 3 channels"):
        layer(randn(4, 3))


def test_an_input_of_another_size_than_the_cut_tensors_is_refused():
    with pytest.raises(bn.InputError, match="must have 3 channels in dimension 1; got 6, in shape"):
        cut(bn.BatchNorm1d(6))(randn(4, 6))


def test_reports_read_a_cut_layer():
    model, x = nn.Sequential(cut(bn.BatchNorm1d(6))), randn(64, 3) + 2
    bn.recalibrate(model, [x])
    torch.testing.assert_close(model[0].running_mean, x.mean(0), **CLOSE)
    assert bn.detect_shift(model.eval(), [x]).layers
    assert bn.explain(model[0].train(), x[:8]).z.shape == (8, 3)


def test_a_cut_layer_within_a_domain_uses_the_cut_statistics():
    layer = bn.add_domains(bn.BatchNorm1d(6), ["real"])
    cut(layer, ("weight", "bias", "running_mean", "running_var", "running_mean_real", "running_var_real"))
    x, small = randn(8, 3), bn.add_domains(bn.BatchNorm1d(3), ["real"])
    for each in (layer, small):
        with bn.use_domain(each, "real"):
            each(x)
    assert torch.equal(layer.running_mean_real, small.running_mean_real)


# torch.nn.utils.prune on a layer with domains


@pytest.mark.parametrize("finished", [False, True], ids=["masked", "removed"])
def test_a_pruned_layer_with_domains_is_the_layer_with_zeros_in_gamma(finished):
    layer = bn.add_domains(bn.BatchNorm1d(6, activation="relu"), ["real", "drawn"])
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 7))
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight[:3] = 0
    prune.l1_unstructured(layer, "weight", amount=0.5)
    if finished:
        prune.remove(layer, "weight")
    x = randn(8, 6)
    for name in ("real", "drawn", "real"):
        with bn.use_domain(layer, name), bn.use_domain(twin, name):
            assert torch.equal(layer(x), twin(x))
    assert_same_buffers(layer, copied_buffers(layer) | copied_buffers(twin))
    with bn.use_domain(layer, "drawn"):
        layer(x).sum().backward()
    assert (layer.weight if finished else layer.weight_orig).grad is not None


def test_domains_can_be_added_to_a_pruned_layer_and_loaded():
    layers = [bn.add_domains(prune.l1_unstructured(bn.BatchNorm1d(6), "weight", 0.5), ["real"]) for _ in range(2)]
    layers[0](randn(8, 6))
    layers[1].load_state_dict(layers[0].state_dict(), strict=True)
    with bn.use_domain(layers[1], "real"):
        assert layers[1](randn(8, 6)).shape == (8, 6)


def test_statistics_of_a_domain_that_were_not_cut_are_named():
    layer = cut(bn.add_domains(bn.BatchNorm1d(6), ["real"]))
    with (
        bn.use_domain(layer, "real"),
        pytest.raises(bn.InputError, match="running_mean_real must have one number for each of the input's 3"),
    ):
        layer(randn(4, 3))
