"""Pairs of a layer with a weight and the batch norm after it that are tuned: how they refer to each other."""

from __future__ import annotations

from typing import Any

from torch import nn

from batchnorm.surgery.derived import underive

__all__ = ["end_tuning", "is_tuned", "link"]


def link(layer: nn.Module, norm: nn.Module) -> None:
    """Let the two layers of a pair refer to each other, by attributes that are no submodules, so that names stay."""
    vars(layer)["tuned_norm"], vars(norm)["tuned_layer"] = norm, layer


def is_tuned(module: nn.Module) -> bool:
    """Return whether a module is one of a tuned pair."""
    return "tuned_layer" in vars(module) or "tuned_norm" in vars(module)


def end_tuning(norm: nn.Module) -> None:
    """Make ordinary layers of a tuned pair, given its batch norm; other modules are left as they are."""
    layer = vars(norm).pop("tuned_layer", None)
    if layer is not None:
        del vars(layer)["tuned_norm"]
        pair: tuple[Any, Any] = (layer, norm)
        for module in pair:
            underive(module, type(module).tuned_by)
