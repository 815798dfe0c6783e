"""Batch normalization layers of timm, torchvision and torchao, as surgery sees them."""

import pytest
from torch import nn

import batchnorm as bn
from batchnorm.surgery.norms import read_norm
from batchnorm.surgery.opening import batch_norms, opened
from support import peer


def test_dropout_of_timm_runs_between_normalization_and_activation():
    layer = peer("timm").layers.BatchNormAct2d(3, drop_layer=nn.Dropout, act_layer="gelu")
    norm = read_norm(layer)
    assert [*norm.activation] == [layer.drop, layer.act]
    assert norm.children == ("drop", "act")


def test_identities_of_timm_are_no_activation():
    assert read_norm(peer("timm").layers.BatchNormAct2d(3, apply_act=False)).activation is None


def test_frozen_layers_of_torchvision_and_timm_are_frozen():
    norm = read_norm(peer("torchvision").ops.FrozenBatchNorm2d(3, eps=0.02))
    assert (norm.frozen, norm.eps, norm.dims, norm.activation) == (True, 0.02, 2, None)
    norm = read_norm(peer("timm").layers.FrozenBatchNormAct2d(3))
    assert norm.frozen
    assert type(norm.activation) is nn.ReLU


def test_frozen_layers_of_torchvision_and_those_of_timm_are_found():
    frozen = peer("torchvision").ops.FrozenBatchNorm2d(3)
    layers = peer("timm").layers
    model = nn.ModuleDict({"frozen": frozen, "act": layers.BatchNormAct2d(3)})
    assert list(batch_norms(model, "fold")) == ["frozen", "act"]


def test_a_model_quantized_by_torchao_is_refused():
    quantization = peer("torchao").quantization
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(bn.UnsupportedError, match="quantized Linear at 0"):
        opened(model, "fold", inplace=True)


def test_the_split_layer_of_timm_has_another_formula():
    assert "cannot be run by itself in train mode" in read_norm(peer("timm").layers.SplitBatchNorm2d(4))
