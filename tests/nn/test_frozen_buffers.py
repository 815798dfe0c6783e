"""Frozen running statistics are kept from code that resets or sets buffers; state dicts and snapshots fill them."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import changed_names, copied_state

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def set_all(layer):
    layer.running_mean = torch.zeros_like(layer.running_mean)
    layer.running_var = torch.ones_like(layer.running_var)
    layer.num_batches_tracked = torch.tensor(0)


def multiply_count(layer):
    """Reset the count of batches as Lightning's StochasticWeightAveraging does."""
    layer.num_batches_tracked *= 0


CHANGES = {
    "reset_running_stats": lambda layer: layer.reset_running_stats(),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "apply": lambda layer: nn.Sequential(layer).apply(
        lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None
    ),
    "assignment": set_all,
    "assignment of None": lambda layer: setattr(layer, "running_mean", None),
    "assignment of a parameter": lambda layer: setattr(layer, "running_var", nn.Parameter(torch.ones(4))),
    "assignment in a domain": lambda layer: setattr(layer, "running_mean_real", torch.zeros(4)),
    "multiplied count": multiply_count,
    "register_buffer": lambda layer: layer.register_buffer("running_mean", torch.zeros(4)),
}


def frozen(**asked):
    """Return a frozen layer that has been trained, with a domain."""
    torch.manual_seed(0)
    layer = bn.BatchNorm1d(4)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(3.0)
        layer(3 * torch.randn(8, 4) + 2)
    return bn.freeze(bn.add_domains(layer, ["real"]), **asked)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_code_that_resets_or_sets_frozen_statistics_is_ignored_and_warned(change):
    layer = frozen(affine=True)
    before = copied_state(layer)
    with pytest.warns(UserWarning, match=r"leaves frozen running statistics as they are.* batchnorm.unfreeze"):
        change(layer)
    assert changed_names(before, layer) == []
    assert type(layer.running_var) is torch.Tensor


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_same_changes_reach_a_layer_that_is_free_again(change):
    layer = bn.unfreeze(frozen())
    before = copied_state(layer)
    change(layer)
    now = layer.state_dict()
    assert any(name not in now or not torch.equal(values, now[name]) for name, values in before.items())


@pytest.mark.parametrize(
    ("asked", "changed"),
    [({"statistics": True}, ["weight", "bias"]), ({"statistics": False, "affine": True}, [*STATISTICS])],
    ids=["statistics", "affine"],
)
def test_reset_parameters_resets_what_is_not_frozen(asked, changed):
    layer = frozen(**asked)
    before = copied_state(layer)
    with pytest.warns(UserWarning, match="leaves frozen"):
        layer.reset_parameters()
    assert changed_names(before, layer) == changed


def test_a_layer_warns_once_of_its_frozen_statistics():
    layer = frozen()
    with pytest.warns(UserWarning, match="reset_running_stats") as warned:
        layer.reset_running_stats()
    assert warned[0].filename == __file__
    layer.reset_running_stats()  # here a warning is an error
    layer.running_mean = torch.zeros(4)


def test_update_bn_leaves_frozen_layers_and_measures_the_others():
    torch.manual_seed(0)
    model = nn.Sequential(bn.BatchNorm1d(4), bn.BatchNorm1d(4))
    rows = torch.randn(40, 4) + 3
    model(rows)
    bn.freeze(model[0])
    before = copied_state(model[0])
    with pytest.warns(UserWarning, match="frozen running statistics"):
        torch.optim.swa_utils.update_bn(rows.split(10), model)
    assert changed_names(before, model[0]) == []
    # A mean of 40 float32 values below 8: a few roundings of 6e-8 times 8.
    torch.testing.assert_close(model[1].running_mean, model[0](rows).mean(0), rtol=0, atol=4e-6)
    assert int(model[1].num_batches_tracked) == 4


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_keeps_frozen_statistics(use_buffers):
    layer = frozen()
    before = copied_state(layer)
    averaged = torch.optim.swa_utils.AveragedModel(layer, use_buffers=use_buffers)
    for _ in range(3):
        layer(torch.randn(8, 4))
        averaged.update_parameters(layer)
    assert changed_names(before, averaged.module) == []


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_fills_frozen_statistics(assign):
    layer, source = frozen(), bn.add_domains(bn.BatchNorm1d(4), ["real"])
    source(torch.randn(8, 4))
    layer.load_state_dict(dict(copy.deepcopy(source.state_dict())), assign=assign)
    assert layer.frozen_statistics
    assert changed_names(copied_state(source), layer) == []


def test_functional_call_normalizes_with_the_statistics_given_and_updates_none():
    layer = frozen()
    given = {"running_mean": torch.full((4,), 2.0), "running_var": torch.full((4,), 4.0)}
    before, x = copied_state(layer), torch.randn(8, 4)
    layer.weight.data.fill_(1.0)
    layer.bias.data.fill_(0.0)
    y = torch.func.functional_call(layer, given, (x,))
    # A difference and a product of float32 numbers below 8: a few roundings of 6e-8 times 4.
    torch.testing.assert_close(y, (x - 2) / (4 + layer.eps) ** 0.5, rtol=0, atol=1e-6)
    assert given["running_mean"].tolist() == [2.0] * 4
    assert changed_names(before, layer) == ["weight", "bias"]


def test_emptying_keeps_frozen_statistics():
    layer = frozen()
    before = copied_state(layer)
    layer.to_empty(device="cpu")
    assert [name for name in changed_names(before, layer) if name.startswith(STATISTICS)] == []


def test_the_count_of_batches_of_a_frozen_layer_reads_as_a_copy():
    layer = frozen()
    for name in ("num_batches_tracked", "num_batches_tracked_real"):
        getattr(layer, name).zero_()
        assert layer._buffers[name] == 1
    bn.unfreeze(layer).num_batches_tracked.zero_()
    assert layer._buffers["num_batches_tracked"] == 0


def test_recalibration_and_adaptation_leave_frozen_layers():
    model = nn.Sequential(frozen(), bn.BatchNorm1d(4))
    before, rows = copied_state(model[0]), torch.randn(40, 4) + 1
    bn.recalibrate(model, rows.split(10))
    bn.adapt(model, rows.split(10))
    assert changed_names(before, model[0]) == []


def test_a_snapshot_is_restored_into_frozen_layers_too():
    layer = frozen()
    taken, before = bn.snapshot(layer), copied_state(layer)
    layer.running_mean.fill_(9.0)
    bn.restore(layer, taken)
    assert changed_names(before, layer) == []


def test_statistics_of_a_lazy_layer_can_be_frozen_before_its_first_batch():
    layer = bn.freeze(bn.LazyBatchNorm1d(), affine=True)
    layer(torch.randn(8, 3))
    assert changed_names(bn.BatchNorm1d(3).state_dict(), layer) == []


def test_micro_batches_before_the_freezing_are_dropped():
    layer = bn.BatchNorm1d(4)
    with bn.accumulate(layer):
        layer(torch.randn(8, 4) + 5)
        bn.freeze(layer)
    assert changed_names(bn.BatchNorm1d(4).state_dict(), layer) == []


def test_a_state_dict_is_loaded_by_swapping_tensors():
    source, layer = frozen(), frozen()
    source.running_mean.add_(1.0)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.load_state_dict(source.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert changed_names(copied_state(source), layer) == []


def test_running_statistics_cannot_be_swapped_by_hand():
    layer = bn.BatchNorm1d(4)
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(layer.running_mean, torch.zeros(4))
