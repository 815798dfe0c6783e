"""Residual branches that begin at zero, so that a block returns its input at first."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.errors import InputError, warn
from batchnorm.nn.layer import Layer
from batchnorm.statistics.changes import layer_name
from batchnorm.surgery.examples import Example
from batchnorm.surgery.graph import Dataflow, read_dataflow
from batchnorm.surgery.norms.formula import is_batch_norm
from batchnorm.surgery.opening import batch_norms, check_model
from batchnorm.surgery.recipes.branches import branch_ends

__all__ = ["zero_init_residual"]


def zero_init_residual(model: nn.Module, example: Example | None = None) -> list[str]:
    """Set gamma to 0 in the last batch normalization layer of every residual branch, in place.

    Each block returns its input at first, which lets deep networks train at higher learning rates (Goyal et al. 2017,
    section 5.1). The branches are found by the data flow, whatever the classes are: the output of the layer is added to
    a path that skips over it. Between the layer and the addition there may be dropout, DropPath, a scale or a gate such
    as squeeze-and-excitation, and changes of shape. A shortcut with one layer of its own, as the downsampling of
    ResNet, is no branch. Beta stays as it is.

    Parameters
    ----------
    model : Module
        A new model, or a trained one whose branches are to begin again.
    example : Tensor, tuple or mapping, optional
        Input of the model, for blocks whose forward cannot be traced.

    Returns
    -------
    list of str
        The paths of the layers whose gamma was set.

    Raises
    ------
    InputError
        The model has no batch normalization layer, or none ends a residual branch.

    Warns
    -----
    UserWarning
        A layer ends a residual branch and has no gamma that can be set, or a block with batch normalization could not
        be read.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> class Block(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear, self.norm = torch.nn.Linear(4, 4), bn.BatchNorm1d(4)
    ...
    ...     def forward(self, x):
    ...         return x + self.norm(self.linear(x))
    >>> bn.zero_init_residual(torch.nn.Sequential(Block(), Block()))
    ['0.norm', '1.norm']
    """
    check_model(model, "zero_init_residual")
    batch_norms(model, "zero_init_residual")
    flow = read_dataflow(model, example)
    found = {flow.path(layer): layer for layer in branch_ends(flow)}
    unread = _unread(flow)
    if not found:
        where = f" that can be read. {unread}" if unread else ""
        raise InputError(
            "zero_init_residual needs a residual branch whose last layer is batch normalization, so that its output is "
            f"added to a path that skips over it; {type(model).__name__} has none{where}"
        )
    refused = {path: reason for path, layer in found.items() if (reason := _refusal(layer))}
    with torch.no_grad():
        for path, layer in found.items():
            if path not in refused:
                layer.get_parameter("weight").zero_()
    if refused:
        reasons = "; ".join(f"{layer_name(path)}: {reason}" for path, reason in refused.items())
        warn(f"zero_init_residual left layers that end a residual branch: {reasons}")
    if unread:
        warn(f"zero_init_residual left batch normalization where it cannot follow the data. {unread}")
    return [path for path in found if path not in refused]


def _refusal(layer: nn.Module) -> str:
    """Return why the gamma of a layer cannot be set; empty if it can."""
    weight = layer._parameters.get("weight")
    if isinstance(layer, Layer) and layer.frozen_affine:
        return "its gamma is frozen"
    if weight is None:
        computed = getattr(layer, "weight", None) is not None and "weight" not in layer._buffers
        return "its gamma is computed, as by a parametrization" if computed else _without_gamma(layer)
    if is_lazy(weight):
        return "it is lazy and has seen no batch, which sets its channels"
    return ""


def _without_gamma(layer: nn.Module) -> str:
    return "its gamma is a constant" if "weight" in layer._buffers else "it has no gamma (affine=False)"


def _unread(flow: Dataflow) -> str:
    """Return which blocks with batch normalization could not be read, as sentences; empty if all were."""
    unread = {
        path: reason
        for path, reason in flow.unread.items()
        if any(is_batch_norm(module) for module in flow.model.get_submodule(path).modules())
    }
    if not unread:
        return ""
    path, reason = next(iter(unread.items()))
    more = f" (and {len(unread) - 1} more blocks)" if len(unread) > 1 else ""
    return " ".join((f"{path or type(flow.model).__name__} cannot be read: {reason}{more}.", *flow.notes()))
