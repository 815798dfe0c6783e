"""Messages about training batches with too few values, which name the layer and the ways out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import nn

from batchnorm.errors import InputError, UnsupportedError, warn

__all__ = ["label_of", "refuse_samples_apart", "refuse_single_value", "refuse_zero_eps", "warn_of_one_sample"]


def refuse_single_value(layer: nn.Module, shape: Sequence[int]) -> NoReturn:
    """Raise the error of a batch in which each channel has a single value, and so no variance."""
    # A graph sees no frames. Where it may break, torch runs this function, which raises, once more without a graph.
    label = "" if torch.compiler.is_compiling() else label_of(layer)
    ways = ["give it more samples", "drop the last incomplete batch (DataLoader's drop_last=True)"]
    if layer.track_running_stats:
        ways.append(
            "build the layer with small_batch='running', which normalizes such a batch with the running statistics"
        )
    raise InputError(
        f"{label}batch statistics need more than 1 value per channel; got input of shape {tuple(shape)}. "
        f"Ways out: {'; '.join(ways)}"
    )


def refuse_samples_apart(layer: nn.Module, shape: Sequence[int]) -> NoReturn:
    """Raise the error of a vmap over the samples, as for gradients per sample: alone, each would get another y."""
    raise UnsupportedError(
        f"{label_of(layer)}batch normalization in training mixes the samples of a batch, so that no gradient belongs "
        f"to one sample; got one sample under vmap, of shape {tuple(shape)}. Ways out: batchnorm.freeze(model), or "
        "another normalization (for Opacus, ModuleValidator.fix(batchnorm.to_torch(model)[0]))"
    )


def refuse_zero_eps(layer: nn.Module) -> NoReturn:
    """Raise the error of a batch that is normalized with its own statistics and an eps of 0."""
    label = "" if torch.compiler.is_compiling() else label_of(layer)
    raise InputError(
        f"{label}eps must be positive where a batch's own statistics are used (a constant channel is divided by "
        "sqrt(eps)); got 0. With running statistics, in eval mode, it may be 0"
    )


def warn_of_one_sample(layer: nn.Module, shape: Sequence[int]) -> None:
    """Warn that the statistics are those of one sample; training can diverge where the last batch is such a batch."""
    warn(
        f"{label_of(layer)}a training batch of one sample, shape {tuple(shape)}, has the statistics of its positions "
        "alone, far from those of a batch: drop the last incomplete batch (DataLoader's drop_last=True)"
    )


def label_of(layer: nn.Module) -> str:
    """Return the layer's module path in the outermost module whose forward is running, as "features.3.norm: "."""
    # torch.compile fails on code that looks at frames; where it is not loaded, disabling it would load it.
    search = torch.compiler.disable(_module_path) if "torch._dynamo" in sys.modules else _module_path  # type: ignore[no-untyped-call]
    path = search(layer)
    return f"{path}: " if path else ""


def _module_path(layer: nn.Module) -> str:
    path = ""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module is not layer:
            path = next((name for name, child in module.named_modules() if child is layer), path)
        frame = frame.f_back  # type: ignore[assignment]
    return path
