"""Recalibration leaves everything but the statistics unchanged, and restores these after any error."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from support import assert_same_buffers, copied_buffers, mixed_network, norm_layers, randn

MODES = ["layerwise", "at_once"]


def data(rows=150):
    return randn(rows, 4, dtype=torch.float64) * 3 + 1


class Breaking:
    """Batches, of which one ends in an exception."""

    def __init__(self, error=None, passes=1):
        self.error, self.passes = error, passes

    def __iter__(self):
        self.passes -= 1
        for part in data().split(32):
            random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002 (as a transform of images would)
            yield part
            if self.error is not None and self.passes == 0:
                raise self.error


class Fragile(nn.Module):
    """Passes on its input so many times."""

    def __init__(self, error, calls):
        super().__init__()
        self.error, self.calls = error, calls

    def forward(self, x):
        torch.rand(1)
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return x


def state(model):
    """All that must not change, beside the buffers."""
    kept = [(module.training, getattr(module, "momentum", None)) for module in model.modules()]
    kept += [list(module._forward_pre_hooks) + list(module._forward_hooks) for module in model.modules()]
    kept += [getattr(module, "track_running_stats", None) for module in model.modules()]
    numpy = [np.asarray(part).tolist() for part in np.random.get_state()]  # noqa: NPY002
    return kept, random.getstate(), numpy, torch.get_rng_state().tolist()


@pytest.mark.parametrize("mode", MODES)
def test_modes_momentum_hooks_and_random_generators_stay_unchanged(mode):
    model = mixed_network().train()
    model[0].register_forward_hook(lambda *_: None)
    model[2].eval()
    before, counts = state(model), [int(layer.num_batches_tracked) for layer in norm_layers(model)]
    bn.recalibrate(model, Breaking(), mode=mode)
    assert state(model) == before
    assert [int(layer.num_batches_tracked) for layer in norm_layers(model)] == counts


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), StopAsyncIteration()], ids=repr)
@pytest.mark.parametrize(("mode", "passes"), [("layerwise", 1), ("layerwise", 3), ("at_once", 1)])
def test_an_error_in_the_loader_restores_the_statistics(error, mode, passes):
    model = mixed_network().train()
    before, kept = copied_buffers(model), state(model)
    with pytest.raises(type(error)):
        bn.recalibrate(model, Breaking(error, passes), mode=mode)
    assert_same_buffers(model, before)
    assert state(model) == kept


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(("mode", "calls"), [("layerwise", 2), ("layerwise", 8), ("at_once", 2)])
def test_an_error_in_the_model_restores_the_statistics(error, mode, calls):
    model = nn.Sequential(mixed_network(), Fragile(error, 10**9), bn.BatchNorm1d(3).double()).train()
    before, kept = copied_buffers(model), state(model)
    model[1].calls = calls
    with pytest.raises(type(error)):
        bn.recalibrate(model, Breaking(), mode=mode)
    assert_same_buffers(model, before)
    assert state(model) == kept


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loader", [[], [torch.empty(0, 4, dtype=torch.float64)]], ids=["nothing", "no rows"])
def test_an_empty_loader_raises_and_changes_nothing(mode, loader):
    model = mixed_network()
    before = copied_buffers(model)
    with pytest.raises(bn.InputError, match="at least one sample"):
        bn.recalibrate(model, loader, mode=mode)
    assert_same_buffers(model, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_raise_with_the_layer_and_change_nothing(mode, value):
    model, x = mixed_network(), data()
    x[70, 2] = value
    before = copied_buffers(model)
    with pytest.raises(bn.InputError, match=r"inputs of 1 must have a finite .* in 6 of 6 channels"):
        bn.recalibrate(model, x.split(32), mode=mode)
    assert_same_buffers(model, before)


def test_a_single_value_has_no_variance():
    layer = bn.BatchNorm1d(4).double()
    before = copied_buffers(layer)
    with pytest.raises(bn.InputError, match="2 values"):
        bn.recalibrate(layer, [data(1)])
    assert_same_buffers(layer, before)


def test_progress_goes_to_stderr(capsys):
    endless = DataLoader(TensorDataset(data()), batch_size=32)
    bn.recalibrate(mixed_network(), endless, mode="at_once", progress=True)
    with pytest.raises(RuntimeError, match="broken"):
        bn.recalibrate(mixed_network(), Breaking(RuntimeError("broken")), mode="at_once", progress=True)
    output = capsys.readouterr()
    assert output.out == ""
    bn.recalibrate(mixed_network(), endless, mode="at_once")
    assert capsys.readouterr() == ("", "")


def test_an_interrupt_in_a_layer_restores_its_buffers_themselves():
    layer = bn.BatchNorm1d(4).double()
    model, buffers = nn.Sequential(layer), dict(layer.named_buffers())
    before = copied_buffers(layer)

    def interrupt(*_):
        raise KeyboardInterrupt

    layer.register_forward_hook(interrupt)  # torch calls no further hook then
    with pytest.raises(KeyboardInterrupt):
        bn.recalibrate(model, [data()], mode="at_once")
    assert all(layer.get_buffer(name) is values for name, values in buffers.items())
    assert_same_buffers(layer, before)
