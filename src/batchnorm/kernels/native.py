"""The CPU kernels of native.cpp: loads the library, lends it torch's threads, says why when it can't.

A tensor is handed over as a pointer and one of two layouts, (N, C, L) contiguous or rows of channels (channels last,
and (N, C)). `ready` brings a tensor into one of them. The library is called with one packed record, since a
conversion for each of its 37 fields would take as long as a small batch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import InputError

__all__ = [
    "FUSED",
    "Limits",
    "Rule",
    "Running",
    "backward",
    "can_move",
    "forward",
    "instructions",
    "ready",
    "reason",
    "supports",
]

ABI = 2
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
CONTIGUOUS = torch.contiguous_format
FUSED: dict[str | None, int] = {None: 0, "relu": 1, "leaky_relu": 2}
HERE = Path(__file__).parent
_PACK = struct.Struct("=33q4d").pack


@dataclass(frozen=True)
class _Library:
    """The loaded library, or the reason why there is none."""

    handle: ctypes.CDLL | None
    reason: str | None


@functools.cache
def _library() -> _Library:
    path = Path(os.environ.get("BATCHNORM_NATIVE_LIBRARY") or HERE / "_native.so")
    if not path.is_file():
        note = HERE / "_native.txt"
        return _Library(None, note.read_text().strip() if note.is_file() else f"{path.name} is not there")
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return _Library(None, f"{path.name} can't be loaded: {error}")
    if handle.bn_abi() != ABI:
        return _Library(None, f"{path.name} was built from other sources: version {handle.bn_abi()}, not {ABI}")
    handle.bn_instructions.restype = ctypes.c_char_p
    for function in (handle.bn_forward, handle.bn_backward):
        function.argtypes = [ctypes.c_char_p]
    threads = _torch_threads()
    if threads is None:
        return _Library(None, f"torch {torch.__version__} lends no threads (torch_parallel_for needs torch 2.10)")
    handle.bn_use_threads(*threads)
    return _Library(handle, None)


def _torch_threads() -> tuple[ctypes.c_void_p, ctypes.c_void_p] | None:
    """Where torch's parallel_for and count of threads are: its stable C interface, torch/csrc/stable/c/shim.h."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.is_file():
            library = ctypes.CDLL(str(path))
            try:
                found = library.torch_parallel_for, library.torch_get_num_threads
            except AttributeError:
                return None
            return ctypes.cast(found[0], ctypes.c_void_p), ctypes.cast(found[1], ctypes.c_void_p)
    return None


def reason() -> str | None:
    """Why the native kernels can't be used; None where they can."""
    return _library().reason


def instructions() -> str:
    """The instruction set that the kernels use on this processor, as AVX2."""
    handle = _library().handle
    return "" if handle is None else handle.bn_instructions().decode()


def supports(x: Tensor) -> bool:
    """Whether the kernels take tensors of this device, dtype and kind."""
    return x.is_cpu and x.dtype in DTYPES and x.layout is torch.strided and not x.is_neg()


def ready(x: Tensor) -> Tensor:
    """The tensor itself where the kernels can read it, else a dense copy."""
    if x.is_contiguous() or (
        x.dim() > 3 and x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    ):
        return x
    return x.contiguous()


class Running(NamedTuple):
    """What a training batch moves: running mean and variance (C,), the count of batches, the weight of the new.

    A momentum of None stands for the cumulative mean: one over the number of batches, this one included. Where
    ``skipped`` is given, a batch that is not finite moves nothing but that count. ``biased`` is the kind of variance
    that is kept. With ``moving`` False all stay, and are only read.
    """

    mean: Tensor | None
    var: Tensor | None
    batches: Tensor | None
    momentum: float | None
    skipped: Tensor | None = None
    biased: bool = False
    moving: bool = True


class Limits(NamedTuple):
    """Of batch renormalization: r between 1 / r_max and r_max, d between -d_max and d_max."""

    r_max: float
    d_max: float


class Rule(NamedTuple):
    """How a batch is normalised.

    ``training`` takes the batch's statistics, those of each of ``chunks`` virtual batches of ``chunk`` samples, the
    last of which takes what is left over. Batch renormalization finds r and d (2, chunks, C) within ``limits``, from
    the running statistics, or is given them as ``correction``.
    """

    eps: float
    activation: str | None
    training: bool
    chunks: int = 1
    chunk: int = 0
    limits: Limits | None = None
    correction: Tensor | None = None


def can_move(running: Running) -> bool:
    """Whether the kernels can write the running statistics where they are."""
    mean, var, batches, _, skipped, *_ = running
    return (
        (mean is None or (mean.is_contiguous() and mean.dtype in DTYPES))
        and (var is None or (var.is_contiguous() and var.dtype in DTYPES))
        and (batches is None or batches.dtype == torch.int64)
        and (skipped is None or skipped.dtype == torch.int64)
    )


def _format(x: Tensor, shape: torch.Size) -> tuple[torch.memory_format, int, int, int]:
    """The memory format of a tensor that is `ready`, whether a position's channels are a row, samples, length."""
    samples = shape[0]
    if len(shape) == 2:
        return CONTIGUOUS, 1, samples, 1
    contiguous, length = x.is_contiguous(), shape[2:].numel()
    if contiguous and length != 1:
        return CONTIGUOUS, 0, samples, length
    kind = CONTIGUOUS if contiguous else torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return kind, 1, samples * length, 1


def _as(x: Tensor, kind: torch.memory_format, values: Tensor) -> Tensor:
    """The values in the dtype and layout of x."""
    if values.stride() == x.stride() and values.dtype == x.dtype and not values.is_neg():
        return values
    return values.to(x.dtype).contiguous(memory_format=kind)


def _pointer(values: Tensor | None, size: int) -> int:
    """Where the values are, checked: what the library reads or writes there is as many of them."""
    if values is None:
        return 0
    if values.is_cpu and values.numel() == size:
        return values.data_ptr()
    if not values.is_cpu:
        raise InputError(f"all tensors must be on the input's device, cpu; got one on {values.device}")
    raise InputError(f"expected {size} values; got shape {tuple(values.shape)}")


def _per_channel(values: Tensor | None, channels: int) -> tuple[int, int]:
    """Pointer and dtype of numbers of channels, which are contiguous."""
    return (0, 0) if values is None else (_pointer(values, channels), DTYPES[values.dtype])


def _parameter(values: Tensor | None) -> Tensor | None:
    return values if values is None or values.is_contiguous() else values.contiguous()


def _mask_bytes(x: Tensor, mask: Tensor) -> Tensor:
    return mask.expand(x.shape[0], *x.shape[2:]).contiguous()


def _call(name: str, record: bytes) -> None:
    if getattr(_library().handle, name)(record):
        raise MemoryError("the native kernels found no memory for the sums of the channels")


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running: Running,
    rule: Rule,
    *,
    wanted: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Normalise x (N, C, *), which is `ready`; where y is not ``wanted`` it is x, and only the moments are taken.

    Returns y, the mean and biased variance used (2, C), or (2, chunks, C) of virtual batches, and the r and d of
    batch renormalization. When training the moments are the batch's own, and the running statistics, which
    `can_move`, do; else those are used.
    """
    sizes, size = x.shape, x.numel()
    kind, rows, samples, length = _format(x, sizes)
    channels = sizes[1]
    eps, activation, training, chunks, chunk, limits, correction = rule
    mean, var, batches, momentum, skipped, biased, moving = running
    y = torch.empty_like(x) if wanted else x
    shape = (2, channels) if chunks == 1 else (2, chunks, channels)
    moments = torch.empty(*shape, dtype=torch.float64)  # a tuple of sizes would take half as long again
    given = correction is not None
    if limits is not None and not given:
        correction = torch.empty(*shape, dtype=torch.float64)
    residual = None if residual is None else _as(x, kind, residual)
    mask = None if mask is None else _mask_bytes(x, mask)
    weight, bias = _parameter(weight), _parameter(bias)
    if not training:
        mean, var = _parameter(mean), _parameter(var)
    weight_at, weight_dtype = _per_channel(weight, channels)
    bias_at, bias_dtype = _per_channel(bias, channels)
    mean_at, mean_dtype = _per_channel(mean, channels)
    var_at, var_dtype = _per_channel(var, channels)
    at = moments.data_ptr()
    record = _PACK(
        DTYPES[x.dtype],
        rows,
        samples,
        channels,
        length,
        chunks,
        chunk * (samples // sizes[0]) if chunk else 0,
        x.data_ptr(),
        _pointer(residual, size),
        _pointer(mask, samples * length),
        0,
        y.data_ptr() if wanted else 0,
        0,
        weight_at,
        bias_at,
        0,
        0,
        weight_dtype,
        bias_dtype,
        at,
        at + 8 * chunks * channels,
        _pointer(correction, 2 * chunks * channels),
        mean_at,
        var_at,
        mean_dtype,
        var_dtype,
        _pointer(batches, 1),
        _pointer(skipped, 1),
        training,
        FUSED[activation],
        training and moving,
        biased,
        given,
        -1.0 if momentum is None else momentum,
        eps,
        *(limits or (1.0, 0.0)),
    )
    _call("bn_forward", record)
    return y, moments, correction


def backward(
    dy: Tensor,
    x: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    rule: Rule,
    *,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dx, dweight, dbias, dresidual) of `forward`, those that are wanted; y is given with a residual."""
    sizes, size = x.shape, x.numel()
    kind, rows, samples, length = _format(x, sizes)
    channels = sizes[1]
    eps, activation, training, chunks, chunk, _, correction = rule
    dy = _as(x, kind, dy)
    y = None if y is None else _as(x, kind, y)
    mask = None if mask is None else _mask_bytes(x, mask)
    weight, bias = _parameter(weight), _parameter(bias)
    weight_at, weight_dtype = _per_channel(weight, channels)
    bias_at, bias_dtype = _per_channel(bias, channels)
    dx = torch.empty_like(x) if wanted[0] else None
    dweight = torch.empty_like(weight) if wanted[1] and weight is not None else None
    dbias = torch.empty_like(bias) if wanted[2] and bias is not None else None
    dresidual = torch.empty_like(x) if wanted[3] else None
    at = moments.data_ptr()
    record = _PACK(
        DTYPES[x.dtype],
        rows,
        samples,
        channels,
        length,
        chunks,
        chunk * (samples // sizes[0]) if chunk else 0,
        x.data_ptr(),
        _pointer(y, size),
        _pointer(mask, samples * length),
        _pointer(dy, size),
        0 if dx is None else dx.data_ptr(),
        0 if dresidual is None else dresidual.data_ptr(),
        weight_at,
        bias_at,
        0 if dweight is None else dweight.data_ptr(),
        0 if dbias is None else dbias.data_ptr(),
        weight_dtype,
        bias_dtype,
        at,
        at + 8 * chunks * channels,
        _pointer(correction, 2 * chunks * channels),
        0,
        0,
        0,
        0,
        0,
        0,
        training,
        FUSED[activation],
        0,
        0,
        correction is not None,
        0.0,
        eps,
        1.0,
        0.0,
    )
    _call("bn_backward", record)
    return dx, dweight, dbias, dresidual
