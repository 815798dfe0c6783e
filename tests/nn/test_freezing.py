"""Frozen layers: what does not change, for how long, and how to undo it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import batchnorm as bn
from support import changed_names, saved_and_loaded

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
}


def network(norm=bn.BatchNorm1d, **options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), norm(4, **options), nn.ReLU(), nn.Linear(4, 2))


def step(model, optimizer, seed):
    """Do one training step on random rows, far from the running statistics."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(8, 5, generator=generator) + 2
    model.train()
    optimizer.zero_grad(set_to_none=False)
    model(x).square().mean().backward()
    optimizer.step()


def trained(name="SGD", steps=3):
    """Return a trained model that still has its gradients, and its optimizer."""
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    for seed in range(steps):
        step(model, optimizer, seed)
    return model, optimizer


def bits(layer, *names):
    """Return copies of the layer's state, or of the tensors that are named."""
    return {name: value.clone() for name, value in layer.state_dict().items() if not names or name in names}


def flags(layer):
    return layer.frozen_statistics, layer.frozen_affine


# What does not change.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_100_rounds_of_train_and_an_optimizer_that_had_gradients_change_no_bit(name):
    model, optimizer = trained(name)
    assert model[1].weight.grad.abs().sum() > 0
    bn.freeze(model, affine=True)
    before, others = bits(model[1]), bits(model[0])
    for seed in range(100):
        step(model, optimizer, 10 + seed)
    assert changed_names(before, model[1]) == []
    assert changed_names(others, model[0]) == ["weight", "bias"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_made_after_freezing_changes_no_bit(name):
    model = bn.freeze(network(), affine=True)
    optimizer = OPTIMIZERS[name](model.parameters())
    before = bits(model[1])
    for seed in range(100):
        step(model, optimizer, seed)
    assert changed_names(before, model[1]) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_statistics_alone_stay_while_gamma_and_beta_learn(name):
    model, optimizer = trained(name)
    bn.freeze(model)
    before = bits(model[1])
    for seed in range(100):
        step(model, optimizer, 10 + seed)
    assert changed_names(before, model[1]) == ["weight", "bias"]


def test_frozen_gamma_and_beta_alone_stay_while_statistics_move():
    model, optimizer = trained()
    bn.freeze(model, statistics=False, affine=True)
    before = bits(model[1])
    step(model, optimizer, 10)
    assert changed_names(before, model[1]) == ["running_mean", "running_var", "num_batches_tracked"]


@pytest.mark.parametrize(
    "options", [{}, {"virtual_batch_size": 2}, {"renorm": bn.Renorm(3.0, 5.0)}, {"momentum": None}], ids=str
)
def test_outputs_and_gradients_in_training_are_those_of_eval(options):
    layer, x = bn.BatchNorm2d(3, **options), torch.randn(4, 3, 2, 2, requires_grad=True)
    for _ in range(3):
        layer(2 * torch.randn(4, 3, 2, 2) + 1)
    layer.eval()
    expected = layer(x)
    (slope,) = torch.autograd.grad(expected.square().sum(), x)
    bn.freeze(layer).train()
    y = layer(x)
    assert torch.equal(y, expected)
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], slope)


def test_a_frozen_output_is_the_formula_with_the_running_statistics():
    layer, x = bn.BatchNorm1d(3), torch.randn(8, 3)
    layer(torch.randn(8, 3) * 2 + 1)
    bn.freeze(layer)
    mean, var = layer.running_mean.double(), layer.running_var.double()
    expected = (x.double() - mean) / torch.sqrt(var + layer.eps)
    # A difference, a product and a sum in float32 of numbers below 4: 4 roundings of 6e-8 times 4.
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=1e-6)


def test_a_frozen_layer_is_deaf_to_poison():
    layer = bn.freeze(bn.BatchNorm1d(2, nonfinite="propagate"))
    before = bits(layer)
    layer(torch.full((4, 2), torch.nan))
    assert changed_names(before, layer) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_asking_the_whole_model_for_gradients_moves_no_frozen_gamma_or_beta(name):
    model = bn.freeze(network(), affine=True).requires_grad_(True)
    optimizer = OPTIMIZERS[name](model.parameters())
    before = bits(model[1])
    for seed in range(5):
        step(model, optimizer, seed)
    assert changed_names(before, model[1]) == []
    assert model[1].weight.grad is None


class Exponential(nn.Module):
    def forward(self, weight):
        return weight.exp()


def test_a_gamma_behind_a_parametrization_is_frozen_and_learns_again():
    layer = bn.BatchNorm1d(4)
    parametrize.register_parametrization(layer, "weight", Exponential())
    bn.freeze(layer, affine=True)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    bn.unfreeze(layer)
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_a_gamma_whose_pruning_ended_while_it_was_frozen_learns_again():
    layer = bn.BatchNorm1d(4)
    prune.l1_unstructured(layer, "weight", 0.5)
    bn.freeze(layer, affine=True)
    prune.remove(layer, "weight")
    bn.unfreeze(layer)
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_every_layer_of_the_model_is_frozen_and_the_model_is_returned():
    model = nn.Sequential(bn.BatchNorm1d(2), nn.Sequential(bn.BatchNorm(2)), nn.Linear(2, 2))
    assert bn.freeze(model, affine=True) is model
    assert [flags(model[0]), flags(model[1][0])] == [(True, True), (True, True)]
    assert bn.unfreeze(model) is model
    assert [flags(model[0]), flags(model[1][0])] == [(False, False), (False, False)]


def test_layers_without_gamma_or_beta_are_frozen_too():
    for layer in (bn.BatchNorm1d(2, affine=False), bn.BatchNorm1d(2, bias=False)):
        bn.freeze(layer, affine=True)
        assert not any(parameter.requires_grad for parameter in layer.parameters())


# It is visible, and can be undone.


def test_the_repr_says_what_is_frozen():
    layer = bn.BatchNorm1d(2)
    stock = repr(layer)
    assert "frozen" not in stock
    assert "frozen_statistics=True" in repr(bn.freeze(layer))
    assert "frozen_affine" not in repr(layer)
    assert "frozen_affine=True" in repr(bn.freeze(layer, affine=True))
    assert repr(bn.unfreeze(layer)) == stock


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unfreezing_lets_all_learn_and_move_again(name):
    model, optimizer = trained(name)
    bn.unfreeze(bn.freeze(model, affine=True))
    before = bits(model[1])
    step(model, optimizer, 10)
    assert changed_names(before, model[1]) == list(before)


def test_after_unfreezing_a_model_goes_on_as_one_that_never_was_frozen():
    model, _ = trained()
    twin = copy.deepcopy(model)
    bn.unfreeze(bn.freeze(model, affine=True))
    for one in (model, twin):
        step(one, OPTIMIZERS["SGD"](one.parameters()), 10)
    assert changed_names(bits(twin), model) == []


def test_unfreezing_one_of_both_leaves_the_other():
    layer = bn.freeze(bn.BatchNorm1d(2), affine=True)
    assert flags(bn.unfreeze(layer, affine=False)) == (False, True)
    assert not layer.weight.requires_grad
    bn.freeze(layer)
    assert flags(bn.unfreeze(layer, statistics=False)) == (True, False)
    assert layer.weight.requires_grad


def test_unfreezing_what_was_not_frozen_leaves_gradients_that_the_user_turned_off():
    layer = bn.BatchNorm1d(2)
    layer.weight.requires_grad_(False)
    bn.unfreeze(layer)
    assert not layer.weight.requires_grad


# Copies and state dicts keep it.


@pytest.mark.parametrize(
    "asked", [{}, {"affine": True}, {"statistics": False, "affine": True}], ids=["statistics", "both", "affine"]
)
def test_a_saved_and_loaded_state_dict_brings_the_flags(asked):
    model, _ = trained()
    state = saved_and_loaded(bn.freeze(model, **asked).state_dict())
    fresh = network()
    fresh.load_state_dict(state, strict=True)
    assert flags(fresh[1]) == flags(model[1])
    assert fresh[1].weight.requires_grad == model[1].weight.requires_grad


def test_a_model_that_loads_a_frozen_state_changes_no_bit_of_it():
    model, _ = trained()
    state = saved_and_loaded(bn.freeze(model, affine=True).state_dict())
    fresh, optimizer = trained()
    fresh.load_state_dict(state)
    before = bits(fresh[1])
    for seed in range(10):
        step(fresh, optimizer, seed)
    assert changed_names(before, fresh[1]) == []


def test_a_state_that_is_not_frozen_unfreezes_the_layer_that_loads_it():
    model = bn.freeze(network(), affine=True)
    model.load_state_dict(saved_and_loaded(network().state_dict()))
    assert flags(model[1]) == (False, False)
    assert model[1].weight.requires_grad


def test_torchs_layers_load_a_frozen_state_strictly():
    model = bn.freeze(trained()[0], affine=True)
    stock = network(nn.BatchNorm1d)
    stock.load_state_dict(saved_and_loaded(model.state_dict()), strict=True)
    assert changed_names(bits(model), stock) == []


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "free"])
@pytest.mark.parametrize("kind", ["stock", "plain dict"])
def test_a_state_without_flags_leaves_the_layers_own(kind, frozen):
    model = network()
    if frozen:
        bn.freeze(model, affine=True)
    other = network(nn.BatchNorm1d) if kind == "stock" else bn.freeze(network(), statistics=not frozen)
    state = other.state_dict()
    model.load_state_dict(saved_and_loaded(state) if kind == "stock" else dict(state))
    assert flags(model[1]) == (frozen, frozen)


def test_frozen_statistics_in_a_model_without_running_statistics_are_refused():
    state = bn.freeze(bn.BatchNorm1d(2)).state_dict()
    layer = bn.BatchNorm1d(2, track_running_stats=False)
    with pytest.raises((bn.InputError, RuntimeError), match="running"):
        layer.load_state_dict(state)


def test_a_deepcopy_is_frozen_too_and_by_itself():
    model = bn.freeze(network(), affine=True)
    twin = copy.deepcopy(model)
    bn.unfreeze(model)
    assert flags(twin[1]) == (True, True)
    assert not twin[1].weight.requires_grad


def test_a_lazy_layer_can_be_frozen_once_it_has_seen_a_batch():
    layer = bn.LazyBatchNorm1d()
    layer(torch.randn(8, 3))
    bn.freeze(layer)
    before = bits(layer)
    layer(torch.randn(8, 3))
    assert changed_names(before, layer) == []


def test_gamma_and_beta_of_a_lazy_layer_can_be_frozen_before_its_first_batch():
    layer = bn.freeze(bn.LazyBatchNorm1d(), affine=True)
    layer(torch.randn(8, 3))
    assert flags(layer) == (True, True)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert all(parameter.requires_grad for parameter in bn.unfreeze(layer).parameters())


# Errors.


def test_a_model_without_batch_normalization_is_refused():
    for verb in (bn.freeze, bn.unfreeze):
        with pytest.raises(bn.InputError, match="Linear has none"):
            verb(nn.Linear(2, 2))


def test_torchs_layers_are_refused_by_their_path_and_nothing_is_frozen():
    model = nn.Sequential(bn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm1d(2)))
    for verb in (bn.freeze, bn.unfreeze):
        with pytest.raises(bn.InputError, match=r"torch's.* 1\.0"):
            verb(model, affine=True)
    assert flags(model[0]) == (False, False)


def test_a_layer_without_running_statistics_is_named_and_nothing_is_frozen():
    model = nn.Sequential(bn.BatchNorm1d(2), bn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(bn.InputError, match=r"^1 must keep running statistics.*track_running_stats=False"):
        bn.freeze(model, affine=True)
    assert flags(model[0]) == (False, False)
    with pytest.raises(bn.InputError, match="track_running_stats=False"):
        model[1].freeze()


def test_gamma_and_beta_can_be_frozen_without_running_statistics():
    layer = bn.freeze(bn.BatchNorm1d(2, track_running_stats=False), statistics=False, affine=True)
    assert flags(layer) == (False, True)
