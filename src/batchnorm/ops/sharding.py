"""How the operators treat DTensors: the channels may be split over a device mesh, all else is gathered.

Each channel is normalized by itself, so a process that has all values of some channels needs nothing of the others.
These are the placements that torch's own batch normalization accepts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm import torch_internals
from batchnorm.ops import operators
from batchnorm.ops.dispatch import is_sharded

__all__ = ["admit"]

CHANNELS = {
    **dict.fromkeys(("x", "dy", "y", "residual", "dx", "dresidual"), 1),
    **dict.fromkeys(("mean", "var", "weight", "bias", "dweight", "dbias"), 0),
}
"""The dimension of the channels in each argument and result; in packed moments and corrections it is the last."""

PACKED = ("moments", "correction")

GRADIENTS_OF = {"dweight": "weight", "dbias": "bias"}
"""The results that are empty where an argument is missing."""


def admit(*tensors: Tensor | None) -> None:
    """Let the operators take DTensors, if one of the tensors is one; torch gathers what has no acceptable placement."""
    if is_sharded(*tensors):
        _register()


@torch_internals.constant_while_compiling
def _register() -> None:
    _register_once()


@functools.cache
def _register_once() -> None:
    from torch.distributed.tensor.experimental import register_sharding

    for name, (arguments, results) in operators.NAMES.items():
        rule = functools.partial(_acceptable, arguments, results)
        register_sharding(getattr(torch.ops.batchnorm, name).default)(rule)


def _acceptable(names: Sequence[str], results: Sequence[str], *arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    """Return the placements of results and arguments that go together: all replicated, or all split by channels."""
    from torch.distributed.tensor import Replicate, Shard

    given = dict(zip(names, arguments, strict=False))

    def split(name: str) -> Any:
        if name in PACKED:
            return Shard(1 if given.get("chunks", 1) == 1 else 2)
        is_empty = name in GRADIENTS_OF and given[GRADIENTS_OF[name]] is None
        return Shard(CHANNELS[name]) if name in CHANNELS and not is_empty else Replicate()

    def placed(place: Callable[[str], Any]) -> tuple[list[Any], list[Any]]:
        tensors = {*CHANNELS, *PACKED, "mask"}
        present = [name if name in tensors and value is not None else None for name, value in given.items()]
        return [place(name) for name in results], [None if name is None else place(name) for name in present]

    return [placed(lambda _: Replicate()), placed(split)]
