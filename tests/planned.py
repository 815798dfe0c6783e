"""Layers that have plans for later calls, and their twins without: ``from planned import twins``."""

import copy

import pytest
import torch

import batchnorm as bn
from batchnorm import ops
from batchnorm.kernels import native
from batchnorm.kernels.call import CallLayout

LAYER = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}
CHANNELS = 6


def laid_out(x, layout):
    """Return x in a memory layout; "channels last" where torch has such a format."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if layout == "channels last" and x.dim() in formats else x


def step(layer, x, dy, residual=None, **how):
    """Return y, the gradients and copies of the buffers after a forward and a backward."""
    x = x.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    y = layer(x, residual)
    leaves = [values for values in (x, residual, *layer.parameters()) if values is not None and values.requires_grad]
    gradients = torch.autograd.grad(y, leaves, dy, **how)
    return [y.detach(), *gradients, *(buffer.clone() for buffer in layer.buffers())]


def assert_same(mine, theirs):
    """Compare lists of tensors for equal values, dtypes, shapes and strides; a NaN equals a NaN."""
    for a, b in zip(mine, theirs, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def twins(x, residual=None, **options):
    """Return a layer that has plans for such input, and its copy that has none."""
    layer = LAYER[x.dim()](CHANNELS, **options)
    with torch.no_grad():
        for values in layer.parameters():
            values.uniform_(0.5, 1.5)
    for _ in range(2):
        step(layer, x, torch.ones_like(x), residual)
    assert layer.step_state.plans
    fresh = copy.deepcopy(layer)
    assert not fresh.step_state.plans
    return layer, fresh


def without_plans(monkeypatch):
    """Let no layer make plans."""
    monkeypatch.setattr(ops, "make_plan", lambda *_: None)


def refuse_checks(monkeypatch):
    """Fail the test at any forward or backward that uses no plan."""

    def refuse(*_, **__):
        pytest.fail("the inputs were checked again")

    for module, name in (
        (ops.normalization, "normalize"),
        (ops, "make_plan"),
        (CallLayout, "of"),
        (native, "backward"),
    ):
        monkeypatch.setattr(module, name, refuse)
