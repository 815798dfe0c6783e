"""Batch normalization layers of timm, torchvision and torchao, as surgery sees them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.surgery.norms.formula import read_norm
from batchnorm.surgery.opening import batch_norms, opened
from support import peer, randn


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


# Whole models.


def small(name):
    torch.manual_seed(0)
    if name == "torchvision resnet18":
        return peer("torchvision").models.resnet18(num_classes=10).double()
    return peer("timm").create_model(name, num_classes=10).double()


def losses(model, optimizer, steps):
    found = []
    for step in steps:
        torch.manual_seed(step)  # for dropout
        y = model(randn(4, 3, 40, 40, seed=step, dtype=torch.float64))
        loss = F.cross_entropy(y, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("name", "inplace"), [("torchvision resnet18", True), ("mobilenetv3_small_050", False)])
def test_training_continues_with_the_same_losses_over_20_steps(name, inplace):
    model = small(name)
    twin = copy.deepcopy(model)
    optimizer, other = (torch.optim.SGD(each.parameters(), lr=1e-4, momentum=0.9) for each in (model, twin))
    expected = losses(twin, other, range(20))
    found = losses(model, optimizer, range(3))
    made, report = bn.convert(model, inplace)
    assert not report.left
    if not inplace:
        optimizer = bn.surgery.update_optimizer(model, made, optimizer)
    found += losses(made, optimizer, range(3, 20))
    # Measured: 1e-15. A larger learning rate makes these networks chaotic.
    assert found == pytest.approx(expected, rel=1e-9)
    state, stock = made.state_dict(), twin.state_dict()
    assert state.keys() == stock.keys()
    for key, values in stock.items():
        torch.testing.assert_close(state[key], values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["efficientnet_b0", "regnetx_002", "levit_128s", "resnet18"])
def test_models_of_timm_are_converted_whole_and_back(name):
    options = {"drop_block_rate": 0.1} if name == "resnet18" else {}
    torch.manual_seed(0)
    size = 224 if name == "levit_128s" else 64
    model = peer("timm").create_model(name, num_classes=10, **options).double()
    x = randn(2, 3, size, size, dtype=torch.float64)
    made, report = bn.convert(model)
    assert not report.left
    assert not any(type(module).__module__.startswith("timm") for module in batch_norms(made, "convert").values())
    made.load_state_dict(model.state_dict())
    model.load_state_dict(made.state_dict())
    for mode in (True, False):
        found = []
        for each in (made, model):
            torch.manual_seed(0)
            found.append(each.train(mode)(x))
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    stock, _ = bn.to_torch(made)
    assert not any(isinstance(module, bn.BatchNorm2d | bn.BatchNorm1d) for module in stock.modules())
    torch.testing.assert_close(stock.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-9)


def test_the_frozen_layers_of_detr_become_ours_and_every_function_finds_them():
    transformers = peer("transformers")
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | {"d_model": 32, "num_queries": 5}
    sizes |= {f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    config = transformers.DetrConfig(use_pretrained_backbone=False, backbone="resnet18", **sizes)
    model = transformers.DetrForObjectDetection(config).eval()
    with pytest.raises(bn.InputError, match=r"has 20 DetrFrozenBatchNorm2d and .* LayerNorm\. batchnorm\.convert"):
        bn.freeze(model)
    made, report = bn.convert(model)
    assert len(report.layers) == 20
    x = randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(made(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)
    made.load_state_dict(model.state_dict())
    model.load_state_dict(made.state_dict())
    bn.recalibrate(bn.unfreeze(made), [{"pixel_values": x}] * 2)


def test_frozen_layers_of_torchvision_stay_frozen_in_training():
    torchvision = peer("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d, num_classes=10)
    made, report = bn.convert(model)
    assert len(report.layers) == 20
    x = randn(2, 3, 32, 32)
    torch.testing.assert_close(made.train()(x), model.train()(x), rtol=1e-5, atol=1e-5)
    assert sum(p.requires_grad for p in made.parameters()) == sum(1 for _ in model.parameters())
    made.load_state_dict(torchvision.models.resnet18(num_classes=10).state_dict())


def test_a_model_of_timm_that_comes_back_loads_its_checkpoint():
    model = peer("timm").create_model("efficientnet_b0", num_classes=10)
    stock, _ = bn.to_torch(bn.convert(model)[0])
    stock.load_state_dict(model.state_dict())
    assert repr(stock) == repr(model)
