"""Cases of other libraries' tests of module surgery, in our words; each names the file that it comes from."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.surgery import update_optimizer
from support import randn

# mmengine, tests/test_model/test_model_utils.py: test_revert_syncbn, test_convert_syncbn.


class WithoutAddModule(nn.Module):
    """A module that refuses new children, as the one of mmengine's test."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def add_module(self, name, module):
        raise ValueError(name)

    def forward(self, x):
        return self.layers(x)


def test_a_synchronized_layer_is_reverted_and_trains_on_the_cpu():
    model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.SyncBatchNorm(8))
    made, _ = bn.convert(model, sync=False)
    assert not isinstance(made[1], nn.SyncBatchNorm)
    assert not made[1].sync
    assert made(randn(2, 3, 10, 10)).shape == (2, 8, 9, 9)


def test_a_layer_is_synchronized_and_becomes_torchs():
    model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8))
    made, _ = bn.convert(model, sync=True)
    assert made[1].sync
    assert type(bn.to_torch(made)[0][1]) is nn.SyncBatchNorm


def test_there_and_back_the_layer_is_the_one_of_its_dimensions():
    model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8))
    synchronized, _ = bn.convert(model, sync=True)
    back, _ = bn.to_torch(bn.convert(synchronized, sync=False)[0])
    assert repr(back) == repr(model)


def test_a_module_that_refuses_new_children_is_converted_all_the_same():
    model = WithoutAddModule(nn.Conv2d(3, 8, 2), nn.SyncBatchNorm(8))
    bn.convert(model, inplace=True)
    assert isinstance(model.layers[1], bn.BatchNorm)


def test_a_model_without_layers_to_revert_is_an_error_that_leaves_it():
    model = WithoutAddModule(nn.Linear(1, 1))
    with pytest.raises(bn.InputError, match="WithoutAddModule has no normalization layer"):
        bn.convert(model, inplace=True, sync=False)


# mmengine, mmengine/model/utils.py: the attributes that revert_sync_batchnorm copies, the qconfig among them.


def test_settings_mode_and_qconfig_are_those_of_the_layer():
    layer = nn.SyncBatchNorm(8, eps=0.1, momentum=0.3, affine=False).eval()
    layer.qconfig = "mine"
    made, _ = bn.convert(layer, sync=False)
    assert (vars(made)["eps"], made.momentum, made.affine, made.training) == (0.1, 0.3, False, False)
    assert made.qconfig == "mine"


# torch, torch/nn/modules/batchnorm.py: what convert_sync_batchnorm loses (pytorch issues 187298 and 41081).


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def test_synchronizing_keeps_hooks_sharing_and_the_activation_of_a_subclass():
    layer, seen = Activated(3), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    made, _ = bn.convert(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}), sync=True)
    assert made["a"] is made["b"][0]
    assert made["a"].sync
    assert made["a"](randn(2, 3, 4, 4)).min() == 0
    assert seen == [1]


# Composer, tests/utils/test_module_surgery.py: replace_module_classes.


class Nested(nn.BatchNorm1d):
    """A layer of the kind to be replaced, with another as a child."""

    def __init__(self, features):
        super().__init__(features)
        self.submodule = nn.BatchNorm1d(features - 1)


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.norm1 = nn.Linear(16, 32), nn.BatchNorm1d(32)
        self.fc2, self.norm2 = nn.Linear(32, 10), Nested(10)
        self.pool = nn.MaxPool2d(3)


def test_layers_are_replaced_within_layers_and_others_are_not():
    made, report = bn.convert(Policy())
    assert [row.path for row in report.layers] == ["norm1", "norm2", "norm2.submodule"]
    assert type(made.norm2) is type(made.norm2.submodule) is bn.BatchNorm1d
    assert [type(made.fc1), type(made.fc2), type(made.pool)] == [nn.Linear, nn.Linear, nn.MaxPool2d]


def test_a_model_with_no_match_is_not_touched():
    model = nn.Sequential(nn.Linear(2, 3), nn.MaxPool2d(3))
    before = [*model.modules()]
    with pytest.raises(bn.InputError):
        bn.convert(model, inplace=True)
    assert [*model.modules()] == before


# Composer, the same file: replace_module_classes with an optimizer, and update_params_in_optimizer.


class CopiedLinear(nn.Module):
    """A replacement with a new weight, and the very bias of the layer that it replaces."""

    def __init__(self, layer):
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.bias = layer.bias


@pytest.fixture
def surgery():
    """An old model, a new one that shares some of its parameters, and an optimizer that was updated."""
    old = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(4, 16), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(old.parameters(), lr=0.001)
    new = nn.Sequential(old[0], CopiedLinear(old[1]), CopiedLinear(old[2]))
    update_optimizer(old, new, optimizer)
    return old, new, [id(parameter) for parameter in optimizer.param_groups[0]["params"]]


def test_the_optimizer_has_no_parameter_twice(surgery):
    *_, optimized = surgery
    assert len(optimized) == len(set(optimized))


def test_parameters_that_were_replaced_are_gone(surgery):
    old, _, optimized = surgery
    assert not {id(old[1].weight), id(old[2].weight)} & set(optimized)


def test_the_optimizer_has_all_parameters_of_the_new_model_in_their_order(surgery):
    _, new, optimized = surgery
    assert optimized == [id(parameter) for parameter in new.parameters()]


def test_parameters_that_were_not_replaced_are_still_there(surgery):
    old, _, optimized = surgery
    assert {id(old[1].bias), id(old[2].bias)} <= set(optimized)


class Four(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Linear(size, size) for size in (8, 16, 32, 64))


def test_the_parameters_of_another_model_of_the_same_class_take_their_places_in_order():
    first, second = Four(), Four()
    optimizer = torch.optim.Adam(first.parameters(), lr=0.01)
    update_optimizer(first, second, optimizer)
    expected = [id(parameter) for parameter in second.parameters()]
    assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == expected


def test_each_of_several_optimizers_keeps_its_part():
    old = Four()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (old.fc1, old.fc3)]
    new = copy.deepcopy(old)
    for optimizer, part in zip(optimizers, (new.fc1, new.fc3), strict=True):
        update_optimizer(old, new, optimizer)
        assert {*map(id, optimizer.param_groups[0]["params"])} == {*map(id, part.parameters())}
