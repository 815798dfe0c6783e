"""Networks of the real families, made small."""

import pytest

pytest.importorskip("transformers", reason="whole models need pip install 'batchnorm[bench]'")

from torch import nn

import batchnorm as bn
from batchnorm.lab.bench.models import batch_of, find_difference, network, with_our_layers

TINY = {
    "resnet50": {"depths": [1, 1], "hidden_sizes": [16, 32], "embedding_size": 8},
    "mobilenetv2": {"depth_multiplier": 0.25},
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", TINY)
def test_the_swapped_network_has_the_same_loss_and_gradients(name, layout):
    model = network(name, num_labels=10, **TINY[name])
    assert find_difference(model, with_our_layers(model), *batch_of(4, layout, 32, 10)) is None


def test_every_batch_norm_of_resnet_is_ours_and_no_relu_is_left_beside_it():
    model = network("resnet50", num_labels=10, **TINY["resnet50"])
    ours = with_our_layers(model)
    layers = [module for module in ours.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(isinstance(layer, bn.BatchNorm2d) for layer in layers)
    assert len(layers) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    shortcuts = [name for name, m in ours.named_modules() if isinstance(m, bn.BatchNorm2d) and m.activation is None]
    assert all(".shortcut." in name for name in shortcuts)


def test_a_network_that_lost_an_activation_is_found():
    model = network("resnet50", num_labels=10, **TINY["resnet50"])
    ours = with_our_layers(model)
    ours.resnet.encoder.stages[0].layers[0].layer[-1].normalization.activation = None
    assert find_difference(model, ours, *batch_of(4, "contiguous", 32, 10)).startswith("the logits, torch.float64: ")
