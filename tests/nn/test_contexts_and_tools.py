"""Contexts as tools find them: state dicts that are assigned, converters that read attributes, TorchScript."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import assert_same_buffers, copied_buffers, randn

KINDS = [bn.BatchNorm1d, nn.BatchNorm1d]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


def network(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(2), nn.Linear(2, 2), kind(2))
    model(randn(8, 2) + 3)
    return model


def adapted(model):
    return bn.adapt(model, [randn(8, 2) + 9])


def in_script(model):
    return torch.jit.script(model)


def traced(model):
    return torch.jit.trace(model, randn(8, 2), check_trace=False)


@pytest.mark.parametrize("context", [bn.no_stat_updates, adapted, bn.adapt])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_that_is_loaded_within_a_context_fills_all(kind, assign, context):
    model, loaded = network(kind), {name: values + 5 for name, values in network(kind).state_dict().items()}
    with context(model):
        model.load_state_dict(loaded, assign=assign)
    assert_same_buffers(model, copied_buffers(model) | {name: v for name, v in loaded.items() if "running" in name})
    assert torch.equal(model[0].num_batches_tracked, loaded["0.num_batches_tracked"])


@pytest.mark.parametrize("context", [bn.no_stat_updates, adapted, bn.adapt])
def test_torchs_layers_that_are_converted_within_a_context_update_afterwards(context):
    model = network(nn.BatchNorm1d)
    with context(model):
        assert model[0].track_running_stats
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted[0].track_running_stats


class Asking(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) if self._asks() else x

    def _asks(self):
        return not self.track_running_stats


def test_the_forward_of_a_subclass_of_torchs_layer_finds_that_updates_are_paused():
    layer, x = Asking(2), randn(8, 2)
    with bn.no_stat_updates(layer):
        assert not torch.equal(layer(x), x)
    assert torch.equal(layer(x), x)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("record", [in_script, traced])
@pytest.mark.parametrize("kind", KINDS)
def test_a_script_or_trace_made_within_no_stat_updates_updates_nothing(kind, record):
    model, x = network(kind), randn(8, 2, seed=1)
    with bn.no_stat_updates(model):
        recorded = record(model)
    before = copied_buffers(recorded)
    torch.testing.assert_close(recorded(x), network(kind)(x))
    assert_same_buffers(recorded, before)
    later = record(model)
    later(x)
    assert not torch.equal(later.state_dict()["0.running_mean"], before["0.running_mean"])


@pytest.mark.parametrize("record", [in_script, traced])
@pytest.mark.parametrize("kind", KINDS)
def test_scripts_and_traces_of_what_is_adapted_to_each_batch_are_refused(kind, record):
    model = network(kind).eval()
    with bn.adapt(model), pytest.raises(bn.UnsupportedError, match="cannot record a forward that is adapted to each"):
        record(model)


@pytest.mark.parametrize("record", [in_script, traced])
def test_scripts_and_traces_of_training_within_accumulate_are_refused(record):
    model = network(bn.BatchNorm1d)
    with bn.accumulate(model), pytest.raises(bn.UnsupportedError, match="a forward within batchnorm"):
        record(model)
    with bn.accumulate(model.eval()):
        record(model)
