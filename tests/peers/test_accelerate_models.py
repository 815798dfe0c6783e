"""Models of torchvision, timm and transformers, accelerated: what is fused, and that training stays the same."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from steps_of_models import assert_same_training
from support import peer, randn

TORCHVISION = {  # the layers that do: an activation, add, add and ReLU, and nothing but batch normalization
    "resnet18": (9, 0, 8, 3),
    "mobilenet_v2": (0, 10, 0, 42),
    "regnet_y_400mf": (33, 0, 16, 4),
    "googlenet": (57, 0, 0, 0),
}
TIMM = {
    "dla34": (21, 0, 12, 4),
    "repvgg_a0": (0, 17, 22, 22),
}
TRANSFORMERS = {
    "ResNet": ({"depths": [2, 2], "hidden_sizes": [16, 32], "embedding_size": 16}, (9, 0, 4, 1)),
    "RegNet": ({"depths": [1, 2], "hidden_sizes": [16, 32], "groups_width": 16}, (7, 0, 3, 2)),
}


def counts(report):
    """Return how many layers do an activation, an addition, both, or neither."""
    steps = [row.after.split(" + ")[1:] for row in report.layers]
    return (
        sum(len(each) == 1 and each != ["add"] for each in steps),
        steps.count(["add"]),
        sum(len(each) == 2 for each in steps),
        steps.count([]),
    )


def check(model, expected, size=64):
    model = model.double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = randn(4, 3, size, size, dtype=torch.float64)
    fast, report = bn.accelerate(model, example=x)
    assert counts(report) == expected
    assert report.max_difference < 1e-9
    assert_same_training(model, fast, x, tolerance=1e-7)  # deep networks multiply rounding errors


@pytest.mark.parametrize("name", TORCHVISION)
def test_models_of_torchvision(name):
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    check(getattr(peer("torchvision").models, name)(num_classes=10, **options), TORCHVISION[name])


@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm(name):
    torch.manual_seed(0)
    check(peer("timm").create_model(name, num_classes=10), TIMM[name])


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_models_of_transformers(kind):
    transformers = peer("transformers")
    options, expected = TRANSFORMERS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(num_labels=10, num_channels=3, **options)
    check(getattr(transformers, f"{kind}ForImageClassification")(config), expected)
