"""`tune` on networks of torchvision, timm and transformers, and the cases of other implementations of tune mode."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.surgery.tuning.tuned_pairs import is_tuned
from support import norm_layers, peer, randn

pytestmark = pytest.mark.peers


def torchvision_model(name):
    return lambda: getattr(peer("torchvision").models, name)(num_classes=5)


def timm_model(name, **options):
    return lambda: peer("timm").create_model(name, num_classes=5, **options)


def transformers_resnet():
    transformers = peer("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")
    return transformers.ResNetForImageClassification(config)


MODELS = {
    "torchvision resnet18": (torchvision_model("resnet18"), 20),
    "torchvision mobilenet_v2": (torchvision_model("mobilenet_v2"), 52),
    "timm resnet10t": (timm_model("resnet10t"), 14),
    "timm tf_efficientnet_lite0": (timm_model("tf_efficientnet_lite0", drop_rate=0.0), 49),  # convolutions of its own
    "transformers ResNet": (transformers_resnet, 8),
}


def outputs(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def with_statistics(model):
    """Return a float64 model with statistics, gamma and beta other than those of a new one."""
    draw = torch.Generator().manual_seed(0)
    for layer in norm_layers(model.double()):
        for values, low in (
            (layer.running_mean, -0.5),
            (layer.running_var, 0.5),
            (layer.weight, 0.5),
            (layer.bias, -0.5),
        ):
            values.data.copy_(torch.rand(values.shape, generator=draw, dtype=torch.float64) + low)
    return model.eval()


def gradients(model, x):
    outputs(model, x).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_every_batch_norm_of_the_network_is_folded_and_all_gradients_are_right(name):
    make, count = MODELS[name]
    torch.manual_seed(0)
    stock, x = with_statistics(make()), randn(2, 3, 64, 64, dtype=torch.float64)
    model, report = bn.tune(stock)
    assert (len(report.layers), report.left) == (count, ())
    for layer in norm_layers(model):
        layer.train()  # these alone: dropout stays off
    expected = outputs(stock, x)
    torch.testing.assert_close(outputs(model, x), expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
    found, its = gradients(model, x), gradients(stock, x)
    largest = max(values.abs().max().item() for values in its.values())
    torch.testing.assert_close(found, its, rtol=1e-9, atol=1e-10 * largest)
    stock.load_state_dict(model.state_dict())


# The cases of torch's test/inductor/test_efficient_conv_bn_eval.py, whose pass works within torch.compile, and of
# mmengine's tests/test_model/test_efficient_conv_bn_eval.py.


class OneUse(nn.Module):
    """A layer and a batch norm after it."""

    folded = ("norm",)

    def __init__(self, layer, norm, **options):
        super().__init__()
        self.layer, self.norm = layer(3, 8, **options), norm(8)

    def forward(self, x):
        return self.norm(self.layer(x))


class SeveralUses(nn.Module):
    """Three layers and batch norms of which some are called twice, with arguments by name."""

    folded = ("norm1",)

    def __init__(self, layer, norm, **options):
        super().__init__()
        self.layer1, self.norm1 = layer(3, 8, **options), norm(8)
        self.layer2, self.norm2 = layer(8, 8, **options), norm(8)
        self.layer3, self.norm3 = layer(8, 8, **options), norm(8)

    def forward(self, x):
        x = self.norm1(self.layer1(input=x))
        x = self.norm2(input=self.layer2(self.layer2(x)))
        x = self.norm3(input=self.layer3(input=x))
        return self.norm3(x) + x


KINDS = [
    (nn.Linear, nn.BatchNorm1d, ()),
    (nn.Conv1d, nn.BatchNorm1d, (64,)),
    (nn.Conv2d, nn.BatchNorm2d, (64, 64)),
    (nn.Conv3d, nn.BatchNorm3d, (33, 33, 33)),
    (nn.ConvTranspose1d, nn.BatchNorm1d, (2,)),
    (nn.ConvTranspose2d, nn.BatchNorm2d, (2, 2)),
    (nn.ConvTranspose3d, nn.BatchNorm3d, (1, 1, 1)),
]


@pytest.mark.parametrize("synchronized", [False, True], ids=["", "synchronized"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0].__name__)
@pytest.mark.parametrize("model", [OneUse, SeveralUses])
def test_a_step_of_sgd_is_that_of_eval_mode(model, kind, bias, synchronized):
    layer, norm, size = kind
    torch.manual_seed(0)
    options = {} if layer is nn.Linear else {"kernel_size": 3, "stride": 2}
    stock = with_statistics(model(layer, norm, bias=bias, **options))
    if synchronized:
        stock = nn.SyncBatchNorm.convert_sync_batchnorm(stock)
    tuned, report = bn.tune(stock)
    assert tuple(each.path for each in report.layers) == model.folded
    assert sum(map(is_tuned, tuned.modules())) == 2 * len(model.folded)
    x, other = (randn(4, 3, *size, seed=seed, dtype=torch.float64) for seed in (0, 1))
    for each in (stock, tuned.train()):
        optimizer = torch.optim.SGD(each.parameters(), lr=1e-3)
        each(x).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(tuned(other), stock(other), rtol=1e-10, atol=1e-10)
