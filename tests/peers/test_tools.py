"""Tools that know torch's layers by type or read their attributes: timm, thop, Opacus, torchvision, torch.ao."""

import copy
import warnings

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import peer, randn

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # sums of 27 products of values near 3: some 30 roundings of 6e-8 each, times 3


def trained(model, *shape):
    model.train()
    with torch.no_grad():
        for seed in range(3):
            model(randn(*shape, seed=seed) * 2 + 1)
    return model.eval()


def network(**options):
    return nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, **options), nn.Conv2d(4, 4, 1))


# timm.


@pytest.mark.parametrize("function", ["freeze_batch_norm_2d", "convert_sync_batchnorm"])
def test_timm_is_stopped_at_an_activation_and_takes_the_model_of_to_torch(function):
    convert = getattr(peer("timm").layers, function)
    model, x = trained(network(activation="relu"), 2, 3, 7, 7), randn(2, 3, 7, 7)
    with pytest.raises(bn.UnsupportedError, match=rf"^{function} takes BatchNorm2d\(4\).*activation='relu'.*to_torch"):
        convert(copy.deepcopy(model))
    converted = convert(bn.to_torch(model)[0])
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
    torch.testing.assert_close(converted(x), model(x), **CLOSE)


@pytest.mark.parametrize("function", ["freeze_batch_norm_2d", "convert_sync_batchnorm"])
def test_timm_converts_a_plain_layer(function):
    model, x = trained(network(), 2, 3, 7, 7), randn(2, 3, 7, 7)
    converted = getattr(peer("timm").layers, function)(copy.deepcopy(model))
    torch.testing.assert_close(converted(x), model(x), **CLOSE)


class Doubled(bn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_torch_fx_traces_a_timm_model_with_a_subclass_of_ours():
    timm = peer("timm")
    with warnings.catch_warnings(action="ignore"):
        model = timm.create_model("resnet10t", norm_layer=Doubled, num_classes=3).eval()
    x = randn(1, 3, 32, 32)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


# torchvision.


def test_torchvisions_frozen_layer_takes_our_state_dict():
    layer = trained(bn.BatchNorm2d(4), 2, 4, 7, 7)
    frozen = peer("torchvision").ops.FrozenBatchNorm2d(4)
    frozen.load_state_dict(layer.state_dict())
    x = randn(2, 4, 7, 7)
    torch.testing.assert_close(frozen(x), layer(x), **CLOSE)


# thop.


def test_thop_counts_the_layers_that_to_torch_made_or_that_custom_ops_name():
    thop = peer("thop")
    from thop.vision.basic_hooks import count_normalization

    def count(model, **options):
        return thop.profile(model, inputs=(randn(1, 3, 7, 7),), verbose=False, **options)[0]

    model = network().eval()
    expected = count(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).eval())
    assert count(model) < expected  # thop does not know the layer, and says nothing
    assert count(bn.to_torch(model)[0]) == expected
    assert count(model, custom_ops={bn.BatchNorm2d: count_normalization}) == expected


# Opacus.


def convolutions(**options):
    return nn.Sequential(nn.Conv1d(2, 4, 1), bn.BatchNorm1d(4, **options), nn.Flatten(), nn.Linear(16, 1))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_opacus_gets_no_gradients_per_sample_of_a_batch_that_was_normalized():
    peer("opacus")
    from opacus.grad_sample import GradSampleModule

    with pytest.raises(NotImplementedError, match="buffers"):
        GradSampleModule(convolutions())
    model = GradSampleModule(convolutions(track_running_stats=False))
    y = model(randn(5, 2, 4))
    with pytest.raises(bn.UnsupportedError, match=r"mixes the samples.*vmap.*to_torch"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_opacus_finds_and_fixes_the_layers_that_to_torch_made():
    peer("opacus")
    from opacus.grad_sample import GradSampleModule
    from opacus.validators import ModuleValidator

    made, _ = bn.to_torch(convolutions(activation="relu"))
    assert "BatchNorm cannot support" in str(ModuleValidator.validate(made)[0])
    fixed = GradSampleModule(ModuleValidator.fix(made))
    fixed(randn(5, 2, 4)).sum().backward()
    assert all(parameter.grad_sample.shape[0] == 5 for parameter in fixed.parameters())


def test_opacus_finds_our_layers_where_its_validator_is_registered_for_them():
    peer("opacus")
    from opacus.validators import ModuleValidator, batch_norm, register_module_validator

    register_module_validator([bn.BatchNorm1d])(batch_norm.validate)
    try:
        assert "BatchNorm cannot support" in str(ModuleValidator.validate(convolutions())[0])
    finally:
        del ModuleValidator.VALIDATORS[bn.BatchNorm1d]


# torch.ao.


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_torch_ao_fuses_and_quantizes_the_layers_that_to_torch_made():
    from torch.ao.quantization import QuantStub, convert, fuse_modules, get_default_qconfig, prepare

    layers = (nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation="relu"))
    model, x = trained(nn.Sequential(*layers), 2, 3, 7, 7), randn(2, 3, 7, 7)
    with pytest.raises(AssertionError, match=r"did not find fuser method for.*batchnorm"):
        fuse_modules(model, ["0", "1"])
    made, _ = bn.to_torch(model)
    fused = fuse_modules(made, ["0", "1.0", "1.1"])
    torch.testing.assert_close(fused(x), model(x), **CLOSE)
    quantized = nn.Sequential(QuantStub(), fused)
    quantized.qconfig = get_default_qconfig("onednn")
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    try:
        prepared = prepare(quantized)
        prepared(x)
        y = convert(prepared)(x).dequantize()
    finally:
        torch.backends.quantized.engine = engine
    assert (y - model(x)).abs().max() < 0.1  # 8 bits over values up to about 5: steps of 0.02, at input and output
