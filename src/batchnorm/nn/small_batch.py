"""Training batches with too little in them: what to say, and of which layer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import nn

from batchnorm.errors import InputError, warn

__all__ = ["place", "refuse_single_value", "warn_of_one_sample"]


def refuse_single_value(layer: nn.Module, shape: Sequence[int]) -> NoReturn:
    """Raise the error of a batch in which each channel has a single value, which has no variance to divide by."""
    # No frames are seen in a graph. Where it need not be whole, torch runs a function that raises once more without.
    at = "" if torch.compiler.is_compiling() else place(layer)
    ways = ["give it more samples", "drop the last incomplete batch (DataLoader's drop_last=True)"]
    if layer.track_running_stats:
        ways.append(
            "build the layer with small_batch='running', which normalises such a batch with the running statistics"
        )
    raise InputError(
        f"{at}batch statistics need more than 1 value per channel; got input of shape {tuple(shape)}. "
        f"Ways out: {'; '.join(ways)}"
    )


def warn_of_one_sample(layer: nn.Module, shape: Sequence[int]) -> None:
    """Say that the statistics are those of one sample: with such a last batch training can diverge."""
    warn(
        f"{place(layer)}a training batch of one sample, shape {tuple(shape)}, has the statistics of its positions "
        "alone, far from those of a batch: drop the last incomplete batch (DataLoader's drop_last=True)"
    )


def place(layer: nn.Module) -> str:
    """The layer's path in the outermost module whose forward is running, as "features.3.norm: "."""
    # torch.compile fails at what looks at frames; where it is not loaded, disabling it would load it.
    look = torch.compiler.disable(_path) if "torch._dynamo" in sys.modules else _path  # type: ignore[no-untyped-call]
    path = look(layer)
    return f"{path}: " if path else ""


def _path(layer: nn.Module) -> str:
    path = ""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module is not layer:
            path = next((name for name, child in module.named_modules() if child is layer), path)
        frame = frame.f_back  # type: ignore[assignment]
    return path
