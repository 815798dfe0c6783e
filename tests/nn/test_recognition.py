"""Functions that need batch norm layers say which normalization layers a model has instead, and the way out."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.nn.recognition import describe_lack, describe_norms
from support import randn


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's, detectron2's and transformers'."""

    def __init__(self, features):
        super().__init__()
        self.eps = 1e-5
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((features,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class Detector(nn.Sequential):
    """A backbone with frozen layers and a head with layer normalization."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 1), FrozenBatchNorm2d(3), FrozenBatchNorm2d(3), nn.Flatten(), nn.LayerNorm(12))


BATCHES = [randn(4, 3, 2, 2)] * 2
FUNCTIONS = {
    "recalibrate": lambda model, _: bn.recalibrate(model, BATCHES),
    "adapt": lambda model, _: bn.adapt(model, BATCHES),
    "adapt to each batch": lambda model, _: bn.adapt(model),
    "detect_shift": lambda model, _: bn.detect_shift(model, BATCHES),
    "freeze": lambda model, _: bn.freeze(model),
    "freeze by a pattern": lambda model, _: bn.freeze(model, layers="1"),
    "unfreeze": lambda model, _: bn.unfreeze(model),
    "snapshot": lambda model, path: bn.snapshot(model, path / "file"),
    "pool_running_stats": lambda model, _: bn.pool_running_stats(model),
    "accumulate": lambda model, _: bn.accumulate(model).__enter__(),
    "add_domains": lambda model, _: bn.add_domains(model, ["real"]),
    "use_domain": lambda model, _: bn.use_domain(model, "real").__enter__(),
}
LACK = (
    "Detector has none; it has 2 FrozenBatchNorm2d and 1 LayerNorm. batchnorm.convert(model) turns FrozenBatchNorm2d "
    "into batchnorm's layers"
)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_model_with_frozen_layers_alone_is_told_what_it_has(name, tmp_path):
    with pytest.raises(bn.InputError) as raised:
        FUNCTIONS[name](Detector(), tmp_path)
    assert str(raised.value).endswith(LACK)


@pytest.mark.parametrize("name", ["recalibrate", "detect_shift", "freeze", "snapshot", "add_domains"])
def test_after_convert_and_unfreeze_the_function_works(name, tmp_path):
    model, _ = bn.convert(Detector())
    FUNCTIONS[name](bn.unfreeze(model), tmp_path)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(2, 3), "Linear has none"),
        (nn.LayerNorm(3), "LayerNorm has none"),
        (nn.Sequential(nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.LayerNorm(3)), "it has 2 LayerNorm and 1 GroupNorm"),
        (nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), "it has 1 BatchNorm1d"),
    ],
)
def test_the_way_out_is_named_only_where_there_is_one(model, words):
    assert describe_lack(model).endswith(words)


def test_norms_are_described_by_their_classes_the_most_frequent_first():
    kinds = [nn.RMSNorm(3), nn.LayerNorm(3), nn.LayerNorm(3), nn.InstanceNorm2d(3), nn.BatchNorm2d(3)]
    assert describe_norms(nn.Sequential(*kinds)) == "has 2 LayerNorm, 1 RMSNorm, 1 InstanceNorm2d and 1 BatchNorm2d"
    assert describe_norms(nn.Linear(2, 3)) == "has no normalization layer"
