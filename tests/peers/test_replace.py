"""Replaced batch normalization in the models of libraries, and Opacus, which takes no batch normalization."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import peer, randn


def assert_trains_on_one_sample(model, size=64):
    model.train()
    model(randn(1, 3, size, size)).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def resnet_without_changes_in_place():
    """Return a small ResNet of torchvision with ``out + identity``: the hooks of Opacus bear no change in place."""
    peer("torchvision")
    from torchvision.models import resnet

    class Block(resnet.BasicBlock):
        def forward(self, x):
            out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            return self.relu(out + (x if self.downsample is None else self.downsample(x)))

    model = resnet.ResNet(Block, [1, 1, 1, 1], num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


@pytest.mark.filterwarnings("ignore:Secure RNG", "ignore:Full backward hook")
@pytest.mark.parametrize("kind", ["group", "layer", "instance"])
def test_opacus_accepts_a_resnet_and_trains_it_for_a_step(kind):
    opacus = peer("opacus")
    model = resnet_without_changes_in_place()
    assert opacus.validators.ModuleValidator.validate(model)  # it objects to batch normalization
    model, _ = bn.replace(model, kind)
    assert opacus.validators.ModuleValidator.validate(model, strict=True) == []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.utils.data.TensorDataset(randn(8, 3, 64, 64), torch.arange(8) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    engine = opacus.PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    before = model.bn1.weight.clone()
    x, y = next(iter(loader))
    nn.functional.cross_entropy(private(x), y).backward()
    assert model.bn1.weight.grad_sample.shape == (4, 64)
    optimizer.step()
    assert not torch.equal(model.bn1.weight, before)


def test_opacus_itself_loses_gamma_beta_and_eps_where_ours_keeps_them():
    opacus = peer("opacus")
    layer = nn.BatchNorm2d(64, eps=1e-3)
    nn.init.constant_(layer.weight, 2.0)
    theirs = opacus.validators.ModuleValidator.fix(nn.Sequential(layer))[0]
    ours = bn.replace(nn.Sequential(layer), "group")[0][0]
    assert (theirs.eps, theirs.weight.unique().item()) == (1e-5, 1)
    assert (ours.eps, ours.weight.unique().item()) == (1e-3, 2)


def test_opacus_itself_makes_groups_of_one_value_where_ours_does_not():
    opacus = peer("opacus")
    model, x = nn.Sequential(nn.BatchNorm1d(32)), randn(4, 32)
    assert opacus.validators.ModuleValidator.fix(model)(x).abs().max() < 1e-3
    assert bn.replace(model, "group")[0](x).std() > 0.9


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "levit_128s"])
def test_timms_layers_keep_their_activations(name):
    timm = peer("timm")
    model, x = timm.create_model(name).eval(), randn(2, 3, 224, 224)
    new, report = bn.replace(model, "group", example=x)
    assert report.left == ()
    assert not any("BatchNorm" in type(module).__name__ for module in new.modules())
    activations = {type(module) for module in model.modules() if type(module).__name__ in ("ReLU", "Hardswish")}
    assert activations == {type(module) for module in new.modules()} & activations
    assert_trains_on_one_sample(new, 224)


def test_the_frozen_layers_of_torchvision_are_replaced():
    torchvision = peer("torchvision")
    model = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    new, report = bn.replace(model, "group")
    assert len(report.layers) == 20
    assert not any(p.requires_grad for name, p in new.named_parameters() if "bn" in name)
    assert_trains_on_one_sample(new)
