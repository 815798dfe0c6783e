"""The record that a call of the native library takes: the fields of the C struct ``Call``, each named once.

A record begins with the constants that a layer and the shape of its input decide, a `CallLayout`, and ends with
pointers to the tensors. All of a small batch's work takes about 10 us, so the functions that pack pointers are compiled
from the list of fields: a loop over names, or a conversion of each field by ctypes, would take as long as the kernel.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.kernels.records import Operands, Rule, Running

__all__ = ["DTYPES", "FUSED", "CallLayout", "pack_backward", "pack_forward"]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
FUSED: dict[str | None, int] = {None: 0, "relu": 1, "leaky_relu": 2}
"""The activations that the kernels fuse, by their codes."""


class CallLayout(NamedTuple):
    """The constants of a call, in the order of the C struct, which documents them."""

    dtype: int
    rows: int
    samples: int
    channels: int
    length: int
    chunks: int
    chunk: int
    weight_dtype: int
    bias_dtype: int
    running_mean_dtype: int
    running_var_dtype: int
    batch_statistics: int
    activation: int
    update_running: int
    unbiased: int
    renorm_given: int
    momentum: float
    eps: float
    r_max: float
    d_max: float

    @classmethod
    def of(cls, operands: Operands, running: Running, rule: Rule) -> CallLayout:
        """Return the layout of a call whose x the library can read where it is."""
        x, weight, bias, *_ = operands
        mean, var, momentum = running.mean, running.var, running.momentum
        rows, samples, channels, length, rows_per_sample = _sizes(x.shape, x.is_contiguous())
        return cls(
            dtype=DTYPES[x.dtype],
            rows=rows,
            samples=samples,
            channels=channels,
            length=length,
            chunks=rule.chunks,
            chunk=rule.chunk * rows_per_sample,
            weight_dtype=_dtype_code(weight),
            bias_dtype=_dtype_code(bias),
            running_mean_dtype=_dtype_code(mean),
            running_var_dtype=_dtype_code(var),
            batch_statistics=rule.training,
            activation=FUSED[rule.activation],
            update_running=rule.training and running.update,
            unbiased=running.unbiased,
            renorm_given=rule.correction is not None,
            momentum=-1.0 if momentum is None else momentum,
            eps=rule.eps,
            r_max=1.0 if rule.limits is None else rule.limits.r_max,
            d_max=0.0 if rule.limits is None else rule.limits.d_max,
        )

    @property
    def moments_shape(self) -> tuple[int, ...]:
        """Shape of the mean and variance that a call gives: (2, C), or (2, chunks, C) for virtual batches."""
        return (2, self.channels) if self.chunks == 1 else (2, self.chunks, self.channels)

    @property
    def var_offset(self) -> int:
        """Number of bytes from the means to the variances."""
        return 8 * self.channels * self.chunks

    def pack(self) -> bytes:
        """Return the beginning of a record."""
        return _CONSTANTS.pack(*self)


def _dtype_code(values: Tensor | None) -> int:
    if values is None:
        return 0
    if values.dtype not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        raise InputError(f"weight, bias and running statistics must have one of the dtypes {known}; got {values.dtype}")
    return DTYPES[values.dtype]


@functools.lru_cache(maxsize=1024)
def _sizes(shape: torch.Size, contiguous: bool) -> tuple[bool, int, int, int, int]:
    """Return whether a position's channels are a row, samples, channels, length, and the rows per sample."""
    samples, channels, length = shape[0], shape[1], shape[2:].numel()
    rows = length == 1 or not contiguous
    return (True, samples * length, channels, 1, length) if rows else (False, samples, channels, length, 1)


_LETTERS = {int: "q", float: "d"}
_KINDS = get_type_hints(CallLayout)
_CONSTANTS = struct.Struct("=" + "".join(_LETTERS[kind] for kind in _KINDS.values()))

POINTERS = (
    "x",
    "other",
    "mask",
    "dy",
    "out",
    "dresidual",
    "weight",
    "bias",
    "dweight",
    "dbias",
    "mean",
    "var",
    "renorm",
    "running_mean",
    "running_var",
    "batches",
    "skipped",
)
"""The pointers at the end of a record, in the order of the C struct."""


def _packer(*given: str) -> Callable[..., bytes]:
    """Return a function of packed constants and, by keyword, the pointers given; it packs null for the others."""
    pack = struct.Struct(f"={len(POINTERS)}q").pack
    values = ", ".join(name if name in given else "0" for name in POINTERS)
    source = f"lambda constants, *, {', '.join(given)}: constants + pack({values})"
    compiled: Callable[..., bytes] = eval(source, {"pack": pack})
    return compiled


_OF_BOTH = ("x", "other", "mask", "out", "weight", "bias", "mean", "var", "renorm")
FORWARD = (*_OF_BOTH, "running_mean", "running_var", "batches", "skipped")
BACKWARD = (*_OF_BOTH, "dy", "dresidual", "dweight", "dbias")
pack_forward, pack_backward = _packer(*FORWARD), _packer(*BACKWARD)


def record_fields() -> list[tuple[str, type, int]]:
    """Return name, type (int for a pointer) and offset of each field, for the test of the C interface."""
    kinds = _KINDS | dict.fromkeys(POINTERS, int)
    return [(name, kind, 8 * i) for i, (name, kind) in enumerate(kinds.items())]
