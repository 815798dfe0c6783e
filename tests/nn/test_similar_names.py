"""Buffers of a subclass whose names begin like those of running statistics or counts: they are the subclass's own."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import compiles, randn

SIMILAR = ("running_variance_floor", "running_mean_ema", "num_batches_tracked_total", "samples_seen_here")


class Watched(bn.BatchNorm1d):
    """A layer with buffers of its own, one of which is a single part of what a domain has."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        for name in SIMILAR:
            self.register_buffer(name, torch.ones(3))


@pytest.fixture(params=["own", "domain"])
def layer(request):
    made = Watched(3)
    return made if request.param == "own" else bn.add_domains(made, ["drawn"])


def test_a_domain_is_where_all_three_statistics_are(layer):
    assert layer.domain_names == (["drawn"] if hasattr(layer, "running_mean_drawn") else [])
    layer(randn(4, 3))  # no count of samples is begun for a domain that is none
    assert "samples_seen_ema" not in layer._buffers
    with pytest.raises(bn.InputError, match="must have the domain 'ema'"), bn.use_domain(layer, "ema"):
        pass


@pytest.mark.parametrize("name", SIMILAR)
@pytest.mark.parametrize("paused", [False, True], ids=["frozen", "paused"])
def test_a_frozen_or_paused_layer_lets_them_be_set_and_changed(layer, name, paused):
    if not paused:
        bn.freeze(layer)
    with bn.no_stat_updates(layer if paused else Watched(3)), warnings.catch_warnings(action="error"):
        setattr(layer, name, torch.zeros(3))
        assert torch.equal(getattr(layer, name), torch.zeros(3))
        getattr(layer, name).add_(2)
        assert torch.equal(getattr(layer, name), torch.full((3,), 2.0))
        layer.register_buffer(name, torch.full((3,), 5.0))
    assert torch.equal(getattr(layer, name), torch.full((3,), 5.0))


def test_a_name_registered_as_none_reads_as_none(layer):
    layer.register_buffer("samples_seen_there", None)
    layer.register_buffer("skipped_batches_there", None)
    assert layer.samples_seen_there is None
    assert layer.skipped_batches_there is None


def test_they_stay_on_the_meta_device_and_come_from_it_as_any_buffer():
    with torch.device("meta"):
        made = bn.freeze(Watched(3))
    assert all(made._buffers[name].is_meta for name in SIMILAR)
    made = made.to_empty(device="cpu")
    assert all(made._buffers[name].shape == (3,) for name in SIMILAR)


def test_state_dicts_copies_and_pickles_keep_them(layer):
    torch.nn.init.constant_(layer.running_mean_ema, 7)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.domain_names == layer.domain_names
        torch.testing.assert_close(dict(other.state_dict()), dict(layer.state_dict()), rtol=0, atol=0)
    assert set(SIMILAR) < set(layer.state_dict())


def test_torchs_layer_gets_them_and_not_the_statistics_of_domains(layer):
    made, report = bn.to_torch(layer)
    assert type(made) is nn.BatchNorm1d
    assert set(made.state_dict()) == {*nn.BatchNorm1d(3).state_dict(), *SIMILAR}
    assert [name for name in report.layers[0].lost if "ema" in name] == []


@compiles
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_frozen_layer_that_is_compiled_changes_them():
    class Counting(Watched):
        def forward(self, x):
            self.num_batches_tracked_total.add_(1)
            return super().forward(x)

    layer = bn.freeze(Counting(3))
    torch.compile(layer, backend="eager", fullgraph=True)(randn(4, 3))
    assert torch.equal(layer.num_batches_tracked_total, torch.full((3,), 2.0))
