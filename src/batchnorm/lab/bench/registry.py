"""The cases to time. A further shape, or a further case, is one line. Importing this file does not load torch."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = [
    "CASES",
    "LAYOUTS",
    "MODEL_NAMES",
    "MODES",
    "OPERATIONS",
    "QUICK",
    "AnyCase",
    "Case",
    "Layout",
    "Mode",
    "ModelCase",
    "Operation",
]

Mode = Literal["train", "forward", "eval"]
Layout = Literal["contiguous", "channels_last"]

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
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
MODES: tuple[Mode, ...] = ("train", "forward", "eval")
LAYOUTS: tuple[Layout, ...] = ("contiguous", "channels_last")
MODEL_NAMES = ("resnet50", "mobilenetv2")


@dataclass(frozen=True)
class Operation:
    """The operations that follow the normalization: an addition, an activation."""

    residual: bool
    activation: str | None


OPERATIONS = {
    "bn": Operation(residual=False, activation=None),
    "bn+relu": Operation(residual=False, activation="relu"),
    "bn+add+relu": Operation(residual=True, activation="relu"),
}


@dataclass(frozen=True)
class Case:
    """A batch normalization to time.

    Attributes
    ----------
    operation : str
        A key of `OPERATIONS`.
    mode : "train", "forward" or "eval"
        "train" is forward and backward with the batch's statistics, "forward" the same without a gradient, "eval"
        normalizes with running statistics, without a gradient.
    dtype : "float32" or "bfloat16"
        Dtype of x, y, the residual and their gradients. The layer's parameters and statistics are float32.
    shape : tuple of int
        Shape of x: (N, C, *).
    layout : "contiguous" or "channels_last"
        Memory format of x, y, the residual and their gradients.
    """

    operation: str
    mode: Mode
    dtype: str
    shape: tuple[int, ...]
    layout: Layout = "contiguous"

    @property
    def shape_text(self) -> str:
        """The shape as text, such as ``64x64x56x56``."""
        return "x".join(map(str, self.shape))

    @property
    def name(self) -> str:
        """The name, such as ``bn+relu/train/float32/64x64x56x56/channels_last``."""
        return "/".join((self.operation, self.mode, self.dtype, self.shape_text, self.layout))

    @property
    def bytes(self) -> int:
        """Size of x."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class ModelCase:
    """Training steps of a network to time: its name, the layout of the images, and the images per step."""

    model: str
    layout: Layout
    batch: int

    @property
    def name(self) -> str:
        """The name, such as ``resnet50/channels_last/batch 16``."""
        return f"{self.model}/{self.layout}/batch {self.batch}"


AnyCase: TypeAlias = Case | ModelCase

# Cases that share the oracle's results, which are costly, are neighbors.
CASES = tuple(
    Case(operation, mode, dtype, shape, layout)
    for shape, dtype, operation, mode in itertools.product(SHAPES, ITEM_BYTES, OPERATIONS, MODES)
    for layout in (LAYOUTS if len(shape) in (4, 5) else LAYOUTS[:1])
)

QUICK = (
    Case("bn+relu", "train", "float32", (64, 64, 56, 56)),
    Case("bn+relu", "train", "float32", (64, 64, 56, 56), "channels_last"),
    Case("bn+add+relu", "train", "bfloat16", (32, 512, 7, 7)),
    Case("bn", "forward", "float32", (64, 64, 1024)),
    Case("bn+relu", "eval", "float32", (4096, 512)),
    Case("bn+relu", "train", "float32", (32, 64)),
)
