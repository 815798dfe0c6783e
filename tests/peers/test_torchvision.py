"""Torchvision's tv_tensors through the layers: subclasses of Tensor whose results are plain tensors."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import peer, randn

# Sums of 64 float32 values of order 5, in another order: off by a few roundings of 6e-8.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["Image", "Video", "Mask"])
def test_a_tv_tensor_gives_what_torchs_layer_gives(kind, mode):
    peer("torchvision")
    from torchvision import tv_tensors

    found = []
    for of in (bn, nn):
        x, layer = getattr(tv_tensors, kind)(randn(4, 3, 4, 4) * 2 + 1).requires_grad_(), of.BatchNorm2d(3).train(mode)
        y = layer(x)
        assert type(y) is torch.Tensor
        y.square().mean().backward()
        found.append([y, x.grad.as_subclass(torch.Tensor), layer.weight.grad, layer.running_var])
    torch.testing.assert_close(*found, **CLOSE)
