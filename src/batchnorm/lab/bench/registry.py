"""The cases: what is normalised, how, in which layout. A further shape, or a further case, is one line."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

__all__ = ["CASES", "OPERATIONS", "QUICK", "Case"]

SHAPES = (
    (64, 64, 56, 56),
    (64, 256, 28, 28),
    (32, 512, 7, 7),
    (16, 64, 112, 112),
    (8, 32, 16, 32, 32),
    (256, 1024),
    (4096, 512),
    (65536, 64),
    (64, 64, 1024),
    (32, 64),
    (8, 16),
    (1, 3, 5, 5),
    (5, 123, 7, 11),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
MODES = ("train", "forward", "eval")


@dataclass(frozen=True)
class Operation:
    """What follows the normalisation: an addition, an activation."""

    residual: bool
    activation: str | None


OPERATIONS = {
    "bn": Operation(residual=False, activation=None),
    "bn+relu": Operation(residual=False, activation="relu"),
    "bn+add+relu": Operation(residual=True, activation="relu"),
}


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Modes: train is forward and backward with the batch's statistics, forward the same without a gradient, eval
    normalises with running statistics, without a gradient.
    """

    operation: str
    mode: str
    dtype: str
    shape: tuple[int, ...]
    layout: str = "contiguous"

    @property
    def name(self) -> str:
        """``bn+relu/train/float32/64x64x56x56/channels_last``."""
        return "/".join((self.operation, self.mode, self.dtype, "x".join(map(str, self.shape)), self.layout))

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of x, y and their gradients; the layer's own numbers are float32."""
        return DTYPES[self.dtype]

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout in torch's terms."""
        return torch.contiguous_format if self.layout == "contiguous" else FORMATS[len(self.shape)]

    @property
    def bytes(self) -> int:
        """Size of x."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


# Neighbours share what the oracle says of them, which is costly: so the order.
CASES = tuple(
    Case(operation, mode, dtype, shape, layout)
    for shape, dtype, operation, mode in itertools.product(SHAPES, DTYPES, OPERATIONS, MODES)
    for layout in (("contiguous", "channels_last") if len(shape) in FORMATS else ("contiguous",))
)

QUICK = (
    Case("bn+relu", "train", "float32", (64, 64, 56, 56)),
    Case("bn+relu", "train", "float32", (64, 64, 56, 56), "channels_last"),
    Case("bn+add+relu", "train", "bfloat16", (32, 512, 7, 7)),
    Case("bn", "forward", "float32", (64, 64, 1024)),
    Case("bn+relu", "eval", "float32", (4096, 512)),
    Case("bn+relu", "train", "float32", (32, 64)),
)
