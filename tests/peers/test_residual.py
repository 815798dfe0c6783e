"""Residual branches of the models of libraries, which have options of their own to begin them at zero."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import peer, randn


def zero_gammas(model):
    weights = {name.removesuffix(".weight"): p for name, p in model.named_parameters() if name.endswith(".weight")}
    return [name for name, weight in weights.items() if weight.dim() == 1 and not weight.any()]


def with_new_gammas(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.ones_(module.weight)
    return model


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_layers_of_resnet_are_those_of_torchvisions_option(name):
    torchvision = peer("torchvision")
    expected = zero_gammas(torchvision.models.get_model(name, zero_init_residual=True))
    assert len(expected) in (8, 16)
    assert bn.zero_init_residual(torchvision.models.get_model(name)) == expected


@pytest.mark.parametrize("name", ["resnet26d", "seresnet50", "regnety_002"])
def test_the_layers_are_those_of_timms_option(name):
    timm = peer("timm")
    model = timm.create_model(name, zero_init_last=True)
    expected = zero_gammas(model)
    assert len(expected) >= 8
    assert bn.zero_init_residual(with_new_gammas(model)) == expected


def test_the_layers_of_levit_are_those_that_timm_begins_at_zero():
    timm = peer("timm")
    model = timm.create_model("levit_128s")
    expected = zero_gammas(model)
    assert len(expected) == 20
    assert bn.zero_init_residual(with_new_gammas(model), randn(2, 3, 224, 224)) == expected


@pytest.mark.parametrize(
    ("name", "blocks", "end"),
    [("mobilenet_v2", 10, ".conv.3"), ("efficientnet_b0", 9, ".block.3.1"), ("regnet_y_400mf", 16, ".f.c.1")],
)
def test_each_block_with_a_shortcut_in_torchvisions_models_has_one(name, blocks, end):
    torchvision = peer("torchvision")
    found = bn.zero_init_residual(torchvision.models.get_model(name))
    assert len(found) == blocks
    assert all(path.endswith(end) for path in found)


@pytest.mark.filterwarnings("ignore:zero_init_residual left batch normalization")
def test_each_block_with_a_shortcut_in_models_of_transformers_has_one():
    transformers = peer("transformers")
    sizes = {"depths": [2, 2], "hidden_sizes": [16, 32], "embedding_size": 8}
    image = {"pixel_values": randn(2, 3, 64, 64)}
    resnet = transformers.ResNetModel(transformers.ResNetConfig(**sizes))
    assert bn.zero_init_residual(resnet) == [
        f"encoder.stages.{stage}.layers.{layer}.layer.2.normalization" for stage in (0, 1) for layer in (0, 1)
    ]
    mobilenet = transformers.MobileNetV2Model(transformers.MobileNetV2Config())
    assert len(bn.zero_init_residual(mobilenet, image)) == 10


def test_a_resnet_trains_from_blocks_that_begin_at_zero():
    torchvision = peer("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=2)
    bn.zero_init_residual(model)
    model(randn(4, 3, 32, 32)).square().sum().backward()
    assert all(model.get_parameter(f"{name}.weight").grad.any() for name in bn.zero_init_residual(model))


@pytest.mark.parametrize("name", ["densenet121", "shufflenet_v2_x0_5"])
def test_models_without_residual_branches_are_an_error(name):
    torchvision = peer("torchvision")
    with pytest.raises(bn.InputError, match="needs a residual branch whose last layer is batch normalization"):
        bn.zero_init_residual(torchvision.models.get_model(name))
