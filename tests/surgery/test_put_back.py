"""Insertion into folded models: the layers come back where they had been, and the function stays."""

import copy
import pickle

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import InputError, UnsupportedError
from support import randn, trained


def folded_of(model, shape):
    given = trained(model, shape).double()
    return given, bn.fold(given, randn(*shape, dtype=torch.float64))[0]


def plain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6, eps=1e-3, momentum=0.3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
        bn.BatchNorm1d(5, activation="silu"),
        nn.Linear(5, 2),
    )


def assert_same_function(model, given, shape):
    x = randn(*shape, seed=5, dtype=torch.float64)
    assert (model.eval()(x) - given.eval()(x)).abs().max() < 1e-9


def test_layers_come_back_with_their_names_settings_and_activations():
    given, folded = folded_of(plain(), (8, 3, 6, 6))
    x = randn(32, 3, 6, 6, seed=1, dtype=torch.float64)
    model, report = bn.insert(folded, example=[x[:20], x[20:]], preserve=True)
    assert [(layer.path, layer.before, layer.after) for layer in report.layers] == [
        ("1", "Folded", "BatchNorm2d"),
        ("5", "Folded", "BatchNorm1d"),
    ]
    assert report.max_difference < 1e-9
    assert model.state_dict().keys() == given.state_dict().keys() - {"4.bias"}
    assert (model[1].epsilon(), model[1].momentum, model[5].activation) == (1e-3, 0.3, "silu")
    assert_same_function(model, given, (8, 3, 6, 6))


def test_the_model_trains_again_and_the_folded_one_does_not():
    _, folded = folded_of(plain(), (8, 3, 6, 6))
    x = randn(16, 3, 6, 6, dtype=torch.float64)
    model, _ = bn.insert(folded, example=x, preserve=True)
    assert not model.training
    model.train()
    before = model[1].running_mean.clone()
    model(x + 3).sum().backward()
    assert not torch.equal(model[1].running_mean, before)
    assert type(model) is nn.Sequential
    with pytest.raises(UnsupportedError, match="for inference"):
        folded.train()


def test_in_place_the_same_modules_become_layers_again():
    given, folded = folded_of(plain(), (8, 3, 6, 6))
    place, weight = folded[1], folded[0].weight
    model, _ = bn.insert(folded, example=randn(8, 3, 6, 6, dtype=torch.float64), preserve=True, inplace=True)
    assert model is folded
    assert model[1] is place
    assert isinstance(place, bn.BatchNorm2d)
    assert model[0].weight is weight
    assert_same_function(model, given, (8, 3, 6, 6))


def test_copies_and_pickles_of_the_result_compute_the_same():
    given, folded = folded_of(plain(), (8, 3, 6, 6))
    model, _ = bn.insert(folded, example=randn(8, 3, 6, 6, dtype=torch.float64), preserve=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_function(twin, given, (8, 3, 6, 6))


class NormAct(nn.BatchNorm2d):
    """Batch normalization and an activation of its own, as timm's BatchNormAct2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.Hardswish()

    def forward(self, x):
        return self.act(super().forward(x))


def test_an_activation_that_no_layer_of_ours_has_runs_behind_the_layer():
    torch.manual_seed(0)
    given, folded = folded_of(nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4), nn.Conv2d(4, 2, 1)), (4, 3, 5, 5))
    model, report = bn.insert(folded, example=randn(4, 3, 5, 5, dtype=torch.float64), preserve=True)
    assert report.max_difference < 1e-9
    assert model.state_dict().keys() >= {"1.weight", "1.running_mean"}
    assert_same_function(model, given, (4, 3, 5, 5))


def test_a_layer_that_was_folded_into_the_next_one_comes_back_before_it():
    torch.manual_seed(0)
    given, folded = folded_of(
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)),
        (4, 3, 5, 5),
    )
    model, report = bn.insert(folded, example=randn(4, 3, 5, 5, dtype=torch.float64), preserve=True)
    assert [layer.path for layer in report.layers] == ["0", "3"]
    assert all(layer.bias is not None for layer in (model[1], model[4]))
    assert_same_function(model, given, (4, 3, 5, 5))


def test_without_preserve_the_layers_are_new():
    _, folded = folded_of(plain(), (8, 3, 6, 6))
    model, report = bn.insert(folded, momentum=0.01)
    assert (model[1].running_var == 1).all()
    assert model[1].momentum == 0.01
    assert any("train it" in note for note in report.notes)


def test_what_cannot_be_undone_leaves_the_folded_model_as_it_is():
    _, folded = folded_of(plain(), (8, 3, 6, 6))
    with pytest.raises(InputError, match="must give at least 2 values"):
        bn.insert(folded, example=randn(1, 3, 6, 6, dtype=torch.float64), preserve=True, inplace=True)
    assert type(folded[1]).__name__ == "Folded"
    assert folded[0].bias is not None
