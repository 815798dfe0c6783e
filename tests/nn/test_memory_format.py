"""The strides of y and of the input's gradient, which are those of torch's layer for every view of a batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import randn

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
KINDS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}
SHAPES = {2: (6, 8), 3: (6, 8, 5), 4: (6, 8, 5, 7), 5: (6, 8, 5, 7, 3)}


def larger(dims, *more):
    """Return values whose sizes are the usual ones plus ``more``."""
    more = (*more, *[0] * (dims - len(more)))
    return randn(*(size + extra for size, extra in zip(SHAPES[dims], more, strict=True)))


def reversed_positions(x):
    return x.permute(0, 1, *range(x.dim() - 1, 1, -1))


VIEWS = {
    "whole": lambda x: x[:6, :8],
    "every other sample": lambda x: x[::2, :8],
    "second half of channels": lambda x: x.chunk(2, 1)[1],
    "every other channel": lambda x: x[:, ::2],
    "one channel": lambda x: x[:, :1],
    "one sample of a batch": lambda x: x[:1],
    "expanded samples": lambda x: x[:1].expand_as(x),
    "expanded channels": lambda x: x[:, :1].expand_as(x),
    "channels and samples swapped": lambda x: x.transpose(0, 1),
}
OF_POSITIONS = {
    "crop": lambda x: x[(slice(None), slice(None), *[slice(1, -1)] * (x.dim() - 2))],
    "crop of rows": lambda x: x[:, :, 1:],
    "crop of columns": lambda x: x[..., 1:],
    "one column": lambda x: x[..., :1],
    "one position": lambda x: x[(..., *[slice(1)] * (x.dim() - 2))],
    "expanded columns": lambda x: x[..., :1].expand_as(x),
    "positions reversed": reversed_positions,
    "channels moved": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
}
CASES = [
    (dims, layout, name)
    for dims in SHAPES
    for layout in ("contiguous", "channels last")
    for name in (VIEWS if dims == 2 else VIEWS | OF_POSITIONS)
    if layout == "contiguous" or dims in LAST
]


def strides_of(layer, x, gradient):
    """Return the strides of y and of the input's gradient."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    dy = torch.ones(()).expand_as(y) if gradient == "expanded" else torch.ones(y.shape)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    return y.stride(), dx.stride()


def differences(dims, layout, name):
    """Return what differs from torch's layer, by mode and gradient."""
    x = larger(dims, 2, 8)
    x = x if layout == "contiguous" else x.contiguous(memory_format=LAST[dims])
    view = (VIEWS | OF_POSITIONS)[name](x)
    found = {}
    for mode in (True, False):
        if mode and view.numel() == view.shape[1]:
            continue
        for gradient in ("expanded", "contiguous"):
            layers = [getattr(of, KINDS[dims])(view.shape[1]).train(mode) for of in (bn, nn)]
            ours, theirs = (strides_of(layer, view, gradient) for layer in layers)
            if ours != theirs:
                found[dims, layout, name, mode, gradient] = ours, theirs
    return found


@pytest.mark.filterwarnings("ignore:.*a training batch of one sample")
@pytest.mark.parametrize(("dims", "layout", "name"), CASES)
def test_y_and_gradient_have_the_strides_that_torchs_layer_gives(dims, layout, name):
    assert differences(dims, layout, name) == {}


@pytest.mark.parametrize("option", [{"activation": "silu"}, {"virtual_batch_size": 2}, {"renorm": bn.Renorm(3.0, 3.0)}])
def test_options_keep_the_layout_of_a_crop(option):
    x = larger(4, 0, 0, 2, 2).contiguous(memory_format=LAST[4])[..., 1:-1, 1:-1]
    layers = [bn.BatchNorm2d(8, **option), nn.BatchNorm2d(8)]
    ours, theirs = (strides_of(layer, x, "expanded") for layer in layers)
    assert ours == theirs


def test_the_reference_kernels_give_the_same_strides():
    code = "import warnings; warnings.simplefilter('ignore')\nimport test_memory_format as test\n"
    code += "assert all(test.differences(*case) == {} for case in test.CASES)"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"BATCHNORM_KERNELS": "reference", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
