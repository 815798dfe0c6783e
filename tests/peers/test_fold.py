"""`fold` on models of other libraries, and the defects of other tools that fold."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import batchnorm as bn
from batchnorm.surgery.examples import eval_outputs, largest_difference
from batchnorm.surgery.norms.formula import is_batch_norm
from support import peer, randn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def randomized(model):
    """Return a float64 model in eval mode with other statistics, gamma and beta than those of a new one."""
    model = model.double().eval()
    for i, module in enumerate(model.modules()):
        if is_batch_norm(module):
            tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
            for name, values in tensors.items():
                if name in ("weight", "running_var"):
                    values.data.copy_(randn(*values.shape, seed=i).abs() + 0.5)
                elif values.is_floating_point():
                    values.data.copy_(randn(*values.shape, seed=i) / 4)
    return model


def check(model, x, folded, left=0, *, example=False):
    """Fold a model, compare the outputs, and count the layers that were folded and left; return the reasons."""
    model, x = randomized(model), x.double()
    made, report = bn.fold(model, (x,) if example else None)
    assert (len(report.layers), len(report.left)) == (folded, left), str(report)
    before, after = eval_outputs(model, (x,)), eval_outputs(made, (x,))
    scale = max(float(values.abs().max()) for values in before)
    assert 0 < scale < torch.inf
    assert largest_difference(before, after) < 1e-9 * scale
    return {row.reason for row in report.left}


def fused_by_torch(model):
    """Return what torch's own fusion makes of a model."""
    from torch.fx.experimental.optimization import fuse  # which warns of TorchScript

    return fuse(copy.deepcopy(model))


IMAGES = randn(2, 3, 32, 32)


# torchvision.


def test_a_resnet_of_torchvision_is_folded():
    models = peer("torchvision").models
    check(models.resnet18(num_classes=3), IMAGES, 20)


def test_densenet_is_folded_where_a_convolution_comes_before():
    models = peer("torchvision").models
    model = models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=3)
    reasons = check(model, IMAGES, 5, 6)
    assert "its input comes from cat, and its output goes to ReLU" in reasons


def test_a_detector_of_torchvision_is_folded_to_the_last_layer():
    detection = peer("torchvision").models.detection
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2)
    folded, report = bn.fold(randomized(model))
    assert (len(report.layers), len(report.left)) == (70, 0)
    x = IMAGES.double()
    torch.testing.assert_close(folded.backbone(x), model.backbone(x), rtol=1e-9, atol=1e-12)


# timm.


@pytest.mark.parametrize(
    ("name", "options", "folded", "left"),
    [
        ("test_efficientnet", {}, 13, 0),
        ("tf_mobilenetv3_small_minimal_100", {}, 34, 0),  # Conv2dSame
        ("test_byobnet", {}, 14, 0),
        ("levit_128s", {"depth": (1, 1, 1), "embed_dim": (16, 32, 48), "img_size": 64}, 28, 0),  # LinearNorm
        ("resnetv2_18d", {}, 10, 9),
    ],
)
def test_models_of_timm_are_folded(name, options, folded, left):
    model = peer("timm").create_model(name, num_classes=3, **options)
    check(model, randn(2, 3, 64, 64), folded, left)


def test_a_convolution_that_standardizes_its_weight_is_left():
    std_conv = peer("timm").layers.StdConv2d
    reasons = check(nn.Sequential(std_conv(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), IMAGES, 0, 1)
    assert any(reason.startswith("the forward of StdConv2d is its own") for reason in reasons)


# transformers.


def test_models_of_transformers_are_folded():
    hf = peer("transformers")
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    check(hf.ResNetModel(hf.ResNetConfig(**resnet)), IMAGES, 6)
    stages = {"hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
    check(hf.LevitForImageClassification(hf.LevitConfig(image_size=64, **stages)), randn(2, 3, 64, 64), 27)


def test_a_frozen_backbone_of_detr_is_folded():
    hf = peer("transformers")
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    heads = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = hf.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, d_model=16, num_queries=5, **heads
    )
    model = hf.DetrForObjectDetection(config)
    assert sum(type(module).__name__ == "DetrFrozenBatchNorm2d" for module in model.modules()) == 6
    check(model, randn(1, 3, 32, 32), 6)


def test_a_forward_that_torch_fx_cannot_trace_is_folded_with_an_example():
    hf = peer("transformers")
    model = hf.MobileNetV1Model(hf.MobileNetV1Config(depth_multiplier=0.25))
    check(model, IMAGES, 27, example=True)
    (reason, *_) = check(model, IMAGES, 0, 27)
    assert "cannot be read: torch.fx cannot trace MobileNetV1ConvLayer" in reason


# Defects of other tools that fold.


def test_linear_layers_without_affine_or_bias_are_folded_where_fuse_linear_bn_eval_crashes():
    model = randomized(nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False)))
    with pytest.raises(TypeError):
        fuse_linear_bn_eval(model[0], model[1])
    check(model, randn(5, 3), 1)


def test_grouped_transposed_convolutions_are_folded_where_fuse_conv_bn_eval_crashes():
    model = randomized(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)))
    with pytest.raises(RuntimeError):
        fuse_conv_bn_eval(model[0], model[1], transpose=True)
    check(model, randn(2, 4, 5, 5), 1)


def test_batch_norm_of_dimension_1_of_three_is_left_where_fuse_is_silently_wrong():
    model, x = randomized(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), randn(2, 4, 3, dtype=torch.float64)
    assert (fused_by_torch(model)(x) - model(x)).abs().max() > 0.1
    check(model, x, 0, 1, example=True)


def test_a_folded_model_refuses_to_train_where_fuse_trains_without_batch_norm():
    model, x = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), IMAGES.double()
    fused = fused_by_torch(model)
    assert torch.equal(fused.train()(x), fused.eval()(x))  # training without batch norm
    with pytest.raises(bn.UnsupportedError):
        bn.fold(model)[0].train()


def test_a_fused_activation_stays_where_fuse_conv_bn_eval_drops_it():
    class NormRelu(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model, x = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), NormRelu(4))), IMAGES.double()
    assert (fuse_conv_bn_eval(model[0], model[1])(x) < 0).any()
    check(model, x, 1)
