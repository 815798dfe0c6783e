"""MONAI's MetaTensor through the layers: a subclass of Tensor with metadata, which replaces methods of a tensor."""

import importlib

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import peer, randn

# Sums of 64 float32 values of order 5, in another order: off by a few roundings of 6e-8.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def step(of, mode):
    """Return y, the gradients and the statistics of a step on a MetaTensor, and the MetaTensor."""
    meta_tensor = importlib.import_module("monai.data").MetaTensor
    x = meta_tensor(randn(4, 3, 4, 4) * 2 + 1, meta={"filename_or_obj": "a.nii"}).requires_grad_()
    layer = of.BatchNorm2d(3).train(mode)
    y = layer(x)
    y.square().mean().backward()
    return y, [x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var], x


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_meta_tensor_gives_what_torchs_layer_gives(mode):
    peer("monai")
    (y, found, x), (expected_y, expected, _) = step(bn, mode), step(nn, mode)
    assert type(y) is type(expected_y) is type(x)
    torch.testing.assert_close(y.as_tensor(), expected_y.as_tensor(), **CLOSE)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert [type(values) for values in found] == [type(values) for values in expected]
    assert y.meta["filename_or_obj"] == "a.nii"


def test_a_unet_of_monais_trains_on_meta_tensors():
    peer("monai")
    from monai.data import MetaTensor
    from monai.networks.nets import BasicUNet

    losses = {}
    for of in (bn, nn):
        torch.manual_seed(0)
        model = BasicUNet(spatial_dims=2, features=(4, 4, 8, 8, 8, 4), norm=("batch", {}))
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, of.BatchNorm2d(module.num_features))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses[of] = []
        for step in range(2):
            loss = model(MetaTensor(randn(2, 1, 32, 32, seed=step))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[of].append(loss.item())
    # 20 layers of float32 sums, each off by some 1e-6 of its size
    assert losses[bn] == pytest.approx(losses[nn], rel=1e-4)
