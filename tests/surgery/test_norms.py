"""Recognition of batch normalization layers, and the probe of those with a forward of their own."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import batchnorm as bn
from batchnorm.surgery.norms.formula import ACTIVATIONS, is_batch_norm, read_norm
from support import copied_state

# Layers with a forward of their own.


class Relu6(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu6(super().forward(x))


class Child(nn.BatchNorm1d):
    """An activation as a child, and one that is never called."""

    def __init__(self, features):
        super().__init__(features)
        self.unused, self.act = nn.Tanh(), nn.PReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class Doubled(nn.BatchNorm1d):
    def forward(self, x):
        return 2 * super().forward(x)


class Masked(nn.BatchNorm1d):
    def forward(self, x, mask=None):
        return super().forward(x)


class Biased(nn.BatchNorm1d):
    """A layer that keeps the biased variance."""

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(x.mean(0), self.momentum)
                self.running_var.lerp_(x.var(0, correction=0), self.momentum)
        mean, var = (x.mean(0), x.var(0, correction=0)) if self.training else (self.running_mean, self.running_var)
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


class Plus(nn.Module):
    """Adds before the activation."""

    def forward(self, x):
        return x + 1


class Between(Child):
    def forward(self, x):
        return self.act(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias) + 1)


class AnyDimension(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, x):
        return


class EvalForEver(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


class Normalizer(nn.Module):
    """Running statistics of another library, clamped."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-5
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x):
        return ((x - self.running_mean) / (self.running_var + self.eps).sqrt()).clamp(-100, 100)


class WithoutEps(nn.Module):
    """As transformers' DetrFrozenBatchNorm2d."""

    def __init__(self, eps):
        super().__init__()
        self.__dict__["hidden"] = eps
        for name, values in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((3,), float(values)))

    def forward(self, x):
        w, b, m, v = (
            each.reshape(1, -1, 1, 1) for each in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = w * (v + self.hidden).rsqrt()
        return x * scale + (b - m * scale)


def assigned():
    layer = nn.BatchNorm1d(3)
    layer.forward = lambda x: x
    return layer


# What is recognized.


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.BatchNorm1d(3), True),
        (bn.LazyBatchNorm(), True),
        (nn.SyncBatchNorm(3), True),
        (Normalizer(), True),
        (nn.InstanceNorm1d(3, track_running_stats=True), False),
        (nn.GroupNorm(1, 3), False),
        (nn.LayerNorm(3), False),
        (nn.Sequential(nn.BatchNorm1d(3)), False),
    ],
)
def test_batch_norm_is_recognized_by_its_statistics(module, expected):
    assert is_batch_norm(module) is expected


@pytest.mark.parametrize(
    ("make", "dims"),
    [
        (nn.BatchNorm1d, 1),
        (nn.BatchNorm2d, 2),
        (nn.BatchNorm3d, 3),
        (nn.SyncBatchNorm, None),
        (AnyDimension, None),
        (bn.BatchNorm1d, 1),
        (bn.BatchNorm3d, 3),
        (bn.BatchNorm, None),
        (Relu6, 2),
        (Child, 1),
    ],
)
def test_the_number_of_dimensions(make, dims):
    assert read_norm(make(3)).dims == dims


def test_the_tensors_and_settings_are_those_of_the_layer():
    layer = nn.BatchNorm2d(5, eps=0.1, momentum=None)
    norm = read_norm(layer)
    assert (norm.num_features, norm.eps, norm.momentum) == (5, 0.1, None)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert getattr(norm, name) is getattr(layer, name)
    assert norm.activation is None
    assert not norm.frozen
    assert norm.uses_running_statistics_in_eval


@pytest.mark.parametrize("make", [nn.BatchNorm1d, bn.BatchNorm1d, Child])
def test_without_affine_and_statistics_the_tensors_are_none(make):
    layer = make(3)
    for name in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias"):
        setattr(layer, name, None)
    norm = read_norm(layer)
    assert norm.weight is norm.bias is norm.running_mean is None
    assert norm.num_features == 3
    assert not norm.uses_running_statistics_in_eval


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_layer_of_ours_is_read_with_its_activation_and_its_frozen_state(name):
    norm = read_norm(bn.freeze(bn.BatchNorm1d(3, activation=name)))
    assert type(norm.activation) is ACTIVATIONS[name]
    assert norm.frozen


def test_a_lazy_layer_has_no_features_yet():
    assert read_norm(nn.LazyBatchNorm2d()).num_features == 0
    assert read_norm(bn.LazyBatchNorm2d()).num_features == 0


def test_a_pruned_and_a_parametrized_layer_are_read_with_their_computed_weights():
    pruned = nn.BatchNorm1d(4)
    prune.random_unstructured(pruned, "weight", 0.5)
    assert read_norm(pruned).weight is pruned.weight
    parametrized = nn.BatchNorm1d(4)
    parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
    assert torch.equal(read_norm(parametrized).weight, F.softplus(torch.ones(4)))


# What is probed.


def test_an_activation_in_the_forward_is_found():
    assert type(read_norm(Relu6(3)).activation) is nn.ReLU6


def test_a_child_that_runs_last_is_found_and_is_the_module_itself():
    layer = Child(3)
    norm = read_norm(layer)
    assert norm.activation is layer.act
    assert norm.children == ("act",)


def test_an_activation_in_the_forward_is_found_behind_a_child_too():
    class Both(nn.BatchNorm2d):
        def __init__(self):
            super().__init__(3)
            self.act = nn.Softsign()

        def forward(self, x):
            return self.act(super().forward(x)).relu()

    norm = read_norm(Both())
    assert [type(part) for part in norm.activation] == [nn.Softsign, nn.ReLU]


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 3e-7])
def test_an_eps_that_is_no_attribute_is_measured(eps):
    norm = read_norm(WithoutEps(eps))
    assert norm.eps == eps
    assert norm.frozen
    assert norm.dims == 2


def test_a_layer_that_stays_in_eval_mode_is_frozen():
    assert read_norm(EvalForEver(3)).frozen


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Linear(2, 3), "Linear is no batch normalization layer"),
        (assigned, "its forward was replaced by an assignment"),
        (lambda: Doubled(3), "something else than batch normalization and an activation in eval mode"),
        (lambda: Between(3), "its child act does not run on the normalized values in eval mode"),
        (lambda: Masked(3), "takes other arguments than the input (x, mask)"),
        (lambda: Biased(3), "it updates its running statistics in another way"),
        (Normalizer, "something else than batch normalization"),
    ],
)
def test_where_the_formula_is_another_the_reason_says_so(make, reason):
    found = read_norm(make())
    assert isinstance(found, str)
    assert reason in found
    assert not found.endswith(".")


@pytest.mark.parametrize("make", [Relu6, Child, Doubled])
def test_a_probe_leaves_the_layer_and_the_random_state_as_they_were(make):
    layer = make(3)
    before, state, shown = copied_state(layer), torch.get_rng_state(), repr(layer)
    read_norm(layer)
    assert all(torch.equal(values, before[name]) for name, values in layer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(layer) == shown


@pytest.mark.parametrize("make", [Relu6, Child])
@pytest.mark.parametrize("change", [{"device": "meta"}, {"dtype": torch.bfloat16}, {"dtype": torch.float64}], ids=str)
def test_a_probe_works_on_any_device_and_dtype(make, change):
    assert read_norm(make(3).to(**change)).activation is not None


def test_the_mode_decides_nothing():
    layer = Child(3)
    assert read_norm(copy.deepcopy(layer).eval()).children == read_norm(layer.train()).children
