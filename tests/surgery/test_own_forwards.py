"""Layers with a forward or members of their own, which no ordinary batch tells from batch normalization."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.surgery.norms.formula import read_norm
from support import randn

SWITCHES = {"off": False}


class Ghost(nn.BatchNorm2d):
    """Normalizes parts of large batches by themselves."""

    def forward(self, x):
        if self.training and len(x) > 3000:
            return torch.cat([super(Ghost, self).forward(part) for part in x.chunk(2)])
        return super().forward(x)


class WarmUp(nn.BatchNorm2d):
    def forward(self, x):
        y = super().forward(x)
        return torch.where(self.num_batches_tracked < 5000, y, y.clamp(-3, 3))


class CountedWarmUp(nn.BatchNorm2d):
    def forward(self, x):
        y = super().forward(x)
        return y if int(self.num_batches_tracked) < 3 else y.clamp(-3, 3)


class Chance(nn.BatchNorm2d):
    def forward(self, x):
        return x if random.random() < 1e-9 else super().forward(x)


class Looking(nn.BatchNorm2d):
    def forward(self, x):
        return x if x.abs().max() > 1e9 else super().forward(x)


class Switched(nn.BatchNorm2d):
    def __init__(self, features):
        super().__init__(features)
        self.off = False

    def forward(self, x):
        return x if self.off else super().forward(x)


class Named(Switched):
    def forward(self, x):
        return x if getattr(self, "off", False) else nn.BatchNorm2d.forward(self, x)


class SwitchedByTheFile(nn.BatchNorm2d):
    def forward(self, x):
        return x if SWITCHES["off"] else super().forward(x)


class Slope(nn.BatchNorm2d):
    slope = 0.01

    def forward(self, x):
        return F.leaky_relu(super().forward(x), self.slope)


class WithoutNan(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(torch.nan_to_num(x))


class Guard(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) if len(x) > 1 else x


class Keeping(nn.BatchNorm2d):
    def forward(self, x):
        self.last = x.detach()
        return super().forward(x)


class Detached(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x.detach())


class Slots(nn.BatchNorm2d):
    __slots__ = ("tag",)


class Renaming(nn.BatchNorm2d):
    """Loads old state dicts."""

    def _load_from_state_dict(self, state, prefix, *arguments):
        for old, new in (("gamma", "weight"), ("beta", "bias")):
            if prefix + old in state:
                state[prefix + new] = state.pop(prefix + old)
        super()._load_from_state_dict(state, prefix, *arguments)


class WithProperty(nn.BatchNorm2d):
    @property
    def gamma(self):
        return self.weight


class WithLength(nn.BatchNorm2d):
    def __len__(self):
        return self.num_features


class Locked(nn.BatchNorm2d):
    def __setattr__(self, name, value):
        if name == "__class__":
            raise RuntimeError("locked")
        super().__setattr__(name, value)


class Resetting(nn.BatchNorm2d):
    def reset_running_stats(self):
        super().reset_running_stats()


class Mode(nn.BatchNorm2d):
    def __init__(self, features):
        super().__init__(features)
        self.fixed = False

    def train(self, mode=True):
        return super().train(mode and not self.fixed)


LEFT = {
    Ghost: "something else for a batch of 3001",
    WarmUp: "something else after 5000 batches",
    CountedWarmUp: "something else after 3 batches",
    Chance: "draws random numbers",
    Looking: "looks at the values of tensors",
    Switched: "reads the attribute off",
    Named: "reads the attribute off",
    SwitchedByTheFile: "reads SWITCHES, which may change",
    Slope: "reads the attribute slope",
    WithoutNan: "something else where the input has nan",
    Guard: "something else for a single value per channel",
    Keeping: "sets the attribute last",
    Detached: "its gradients are not those of batch normalization",
    Slots: "its class has __slots__",
    Renaming: "its class has _load_from_state_dict",
    WithProperty: "its class has gamma",
    WithLength: "its class has __len__",
    Locked: "its class has __setattr__",
    Resetting: "its class has reset_running_stats",
    Mode: "its class has train",
}


@pytest.mark.parametrize(("kind", "reason"), LEFT.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_layer_that_may_do_more_is_left_alone_with_the_reason(kind, reason):
    model = nn.Sequential(nn.BatchNorm2d(4), kind(4))
    made, report = bn.convert(model, inplace=True)
    assert type(made[0]) is bn.BatchNorm2d
    assert type(made[1]) is kind
    assert reason in report.left[0].reason


def test_a_layer_whose_class_cannot_change_leaves_nothing_half_converted():
    class Private(nn.BatchNorm2d):
        __slots__ = ("_hidden",)

    del Private._hidden
    type.__delattr__(Private, "__slots__")
    made, report = bn.convert(nn.Sequential(Private(4), nn.BatchNorm2d(4)), inplace=True)
    assert [type(layer) for layer in made] == [Private, bn.BatchNorm2d]
    assert "object layout differs" in report.left[0].reason


# What is still converted.


class Detectron(nn.Module):
    """As detectron2's FrozenBatchNorm2d, which computes in another way where its input has a gradient."""

    _version = 3

    def __init__(self, features):
        super().__init__()
        self.num_features, self.eps = features, 1e-5
        for name, value in (("weight", 1.5), ("bias", 0.5), ("running_mean", 0.2), ("running_var", 2.0)):
            self.register_buffer(name, torch.full((features,), value))
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x):
        if not x.requires_grad:
            state = self.running_mean, self.running_var, self.weight, self.bias
            return F.batch_norm(x, *state, training=False, eps=self.eps)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + bias.reshape(1, -1, 1, 1).to(x.dtype)

    def _load_from_state_dict(self, state, prefix, metadata, *arguments):
        version = metadata.get("version", None)
        if (version is None or version < 2) and prefix + "running_mean" not in state:
            state[prefix + "running_mean"] = torch.zeros_like(self.running_mean)
        super()._load_from_state_dict(state, prefix, metadata, *arguments)

    def __repr__(self):
        return f"FrozenBatchNorm2d(num_features={self.num_features})"

    @classmethod
    def convert_frozen_batchnorm(cls, module):
        return module


class ByHand(nn.Module):
    """Batch normalization written out."""

    def __init__(self, features):
        super().__init__()
        self.eps, self.momentum = 1e-5, 0.1
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def _moments(self, x):
        return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)

    def forward(self, x):
        mean, var = self._moments(x) if self.training else (self.running_mean, self.running_var)
        if self.training:
            with torch.no_grad():
                n = x.numel() / x.shape[1]
                self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
                self.running_var = (1 - self.momentum) * self.running_var + self.momentum * var * n / (n - 1)
        mean, var, weight, bias = (v.view(1, -1, 1, 1) for v in (mean, var, self.weight, self.bias))
        return (x - mean) / torch.sqrt(var + self.eps) * weight + bias


@pytest.mark.parametrize("kind", [Detectron, ByHand])
def test_layers_written_by_hand_are_converted(kind):
    made, report = bn.convert(kind(4))
    assert not report.left
    assert isinstance(made, bn.BatchNorm2d)
    x = randn(4, 4, 3, 3)
    torch.testing.assert_close(made(x), kind(4)(x), rtol=1e-5, atol=1e-5)


def test_a_probe_leaves_the_random_states_of_python_and_numpy():
    state = random.getstate()
    read_norm(Chance(3))
    assert random.getstate() == state
