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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.kernels.records import Operands, Rule, Running, Saved

__all__ = [
    "FUSED",
    "CallLayout",
    "backward",
    "can_update",
    "forward",
    "instructions",
    "ready",
    "reason",
    "supports",
]

ABI = 3
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
UNWRAPPED = (Tensor, torch.nn.Parameter)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
FUSED: dict[str | None, int] = {None: 0, "relu": 1, "leaky_relu": 2}
HERE = Path(__file__).parent
NOWHERE = 2
NO_MEMORY = "the native kernels found no memory for the sums of the channels"
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
    handle.bn_believe_from.argtypes = [ctypes.c_int64]
    handle.bn_believe_from(_low_address())
    return _Library(handle, None)


def _low_address() -> int:
    """Hardly any memory is below."""
    return ctypes.addressof(ctypes.create_string_buffer(1 << 12)) // 2


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


def are_unwrapped(*tensors: Tensor | None) -> bool:
    """Whether these are torch's own tensors, that hold their values themselves: no wrappers of others."""
    return all(
        values is None
        or (type(values) in UNWRAPPED and torch._C._has_storage(values) and not torch._is_functional_tensor(values))
        for values in tensors
    )


def supports(x: Tensor) -> bool:
    """Whether the kernels take tensors of this device, dtype and kind."""
    return x.is_cpu and x.dtype in DTYPES and x.layout is torch.strided and _is_stored(x)


def _is_stored(values: Tensor) -> bool:
    """Whether what the values read as is in memory: torch may leave it to the reader to negate them, or to find 0."""
    return not (values.is_neg() or values._is_zerotensor())


def _stored(values: Tensor) -> Tensor:
    return values if _is_stored(values) else values.clone()


def is_ready(x: Tensor) -> bool:
    """Whether the kernels can read the tensor where it is."""
    kind = CHANNELS_LAST.get(x.dim())
    return x.is_contiguous() or (kind is not None and x.is_contiguous(memory_format=kind))


def ready(x: Tensor) -> Tensor:
    """The tensor itself where the kernels can read it, else a dense copy."""
    return x if is_ready(x) else x.contiguous()


def can_update(running: Running) -> bool:
    """Whether the kernels can write the running statistics where they are."""
    mean, var, batches, _, skipped, *_ = running
    return (
        (mean is None or (mean.is_contiguous() and mean.dtype in DTYPES))
        and (var is None or (var.is_contiguous() and var.dtype in DTYPES))
        and (batches is None or batches.dtype == torch.int64)
        and (skipped is None or skipped.dtype == torch.int64)
    )


class CallLayout(NamedTuple):
    """What a call is told beside pointers: the fields of the record between them, and the shape of the moments."""

    sizes: tuple[int, int, int, int, int, int, int]
    parameters: tuple[int, int]
    running: tuple[int, int]
    how: tuple[float, ...]
    moments: tuple[int, ...]


NOTHING = Running(update=False)


@functools.lru_cache(maxsize=1024)
def _sizes(shape: torch.Size, contiguous: bool) -> tuple[bool, int, int, int, int]:
    """Whether a position's channels are a row, samples, channels, length, and how many rows a sample has."""
    samples, channels, length = shape[0], shape[1], shape[2:].numel()
    rows = length == 1 or not contiguous
    return (True, samples * length, channels, 1, length) if rows else (False, samples, channels, length, 1)


def layout_of(operands: Operands, running: Running, rule: Rule) -> CallLayout:
    """Of a call with x, which is `ready`."""
    x, weight, bias, *_ = operands
    eps, activation, training, chunks, chunk, limits, correction = rule
    mean, var, _, momentum, _, unbiased, update = running
    rows, samples, channels, length, repeats = _sizes(x.shape, x.is_contiguous())
    return CallLayout(
        (DTYPES[x.dtype], rows, samples, channels, length, chunks, chunk * repeats),
        (0 if weight is None else DTYPES[weight.dtype], 0 if bias is None else DTYPES[bias.dtype]),
        (0 if mean is None else DTYPES[mean.dtype], 0 if var is None else DTYPES[var.dtype]),
        (
            training,
            FUSED[activation],
            training and update,
            not unbiased,
            correction is not None,
            -1.0 if momentum is None else momentum,
            eps,
            *(limits or (1.0, 0.0)),
        ),
        (2, channels) if chunks == 1 else (2, chunks, channels),
    )


def _is_like(x: Tensor, values: Tensor) -> bool:
    """Whether the values are of the dtype and layout of x."""
    _check(values, x.numel())
    return values.stride() == x.stride() and values.dtype == x.dtype and _is_stored(values)


def _like(x: Tensor, values: Tensor | None) -> Tensor | None:
    """The values in the dtype and layout of x."""
    if values is None or _is_like(x, values):
        return values
    kind = torch.contiguous_format if x.is_contiguous() else CHANNELS_LAST[x.dim()]
    return _stored(values).to(x.dtype).contiguous(memory_format=kind)


def _per_channel(values: Tensor | None, channels: int) -> Tensor | None:
    """The numbers of channels, one after the other, checked."""
    if values is None:
        return None
    _check(values, channels)
    return _stored(values).contiguous()


def _mask_bytes(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask with a byte for each position."""
    if mask is None:
        return None
    _check(mask, mask.numel())  # its sizes are for expand to check
    return mask.expand(x.shape[0], *x.shape[2:]).contiguous()


def can_read(x: Tensor, like_x: Sequence[Tensor | None], per_channel: Sequence[Tensor | None]) -> bool:
    """Whether the library can read all these where they are, x being `ready`."""
    return all(values is None or _is_like(x, values) for values in like_x) and all(
        _per_channel(values, x.shape[1]) is values for values in per_channel
    )


def _check(values: Tensor, size: int) -> None:
    """See that the library, which reads or writes so many values where these are, may do so."""
    if values.is_cpu and values.numel() == size:
        return
    if not values.is_cpu:
        raise InputError(f"all tensors must be on the input's device, cpu; got one on {values.device}")
    raise InputError(f"expected {size} values; got shape {tuple(values.shape)}")


def check_counts(running: Running) -> None:
    """Raise `InputError` unless each count is one number."""
    for count in (running.batches, running.skipped):
        if count is not None:
            _check(count, 1)


def _not_done(function: Callable[[bytes], int], status: int, record: bytes, *tensors: Tensor | None) -> None:
    """Say why the library has done nothing, or let it do it."""
    if status == NOWHERE:
        for values in tensors:
            if values is not None and values.numel() and values.untyped_storage().data_ptr() == 0:
                shape = tuple(values.shape)
                raise InputError(f"tensors must have their values in memory; that of one of shape {shape} was freed")
        _library().handle.bn_believe_from(0)  # type: ignore[union-attr]  # there is memory, here it begins near 0
        status = function(record)
    if status:
        raise MemoryError(NO_MEMORY)


def forward(operands: Operands, running: Running, rule: Rule) -> tuple[Tensor, Tensor, Tensor | None]:
    """Normalise x (N, C, *), which is `ready`.

    Returns y, the mean and biased variance used (2, C), or (2, chunks, C) of virtual batches, and the r and d of
    batch renormalization. When training the moments are the batch's own, and the running statistics, which
    `can_update`, are updated; else those are used.
    """
    return _forward(operands, running, rule, wanted=True)


def moments(x: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """Return the mean and biased variance of x, which is `ready`: (2, C), or (2, chunks, C) of virtual batches."""
    return _forward(Operands(x, mask=mask), NOTHING, rule, wanted=False)[1]


def _forward(operands: Operands, running: Running, rule: Rule, *, wanted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Do as `forward`; without ``wanted`` y is x, and only the moments are computed."""
    x, weight, bias, residual, mask = operands
    channels, correction = x.shape[1], rule.correction
    layout = layout_of(operands, running, rule)
    mean, var, batches, _, skipped, *_ = running
    check_counts(running)
    if correction is not None:
        _check(correction, 2 * rule.chunks * channels)
    elif rule.limits is not None:
        correction = torch.empty(*layout.moments, dtype=torch.float64, device="cpu")
    # A tuple of sizes would take half as long again; there may be another default device.
    moments = torch.empty(*layout.moments, dtype=torch.float64, device="cpu")
    y = run_forward(
        layout,
        moments.data_ptr(),
        x,
        _per_channel(weight, channels),
        _per_channel(bias, channels),
        _like(x, residual),
        _mask_bytes(x, mask),
        _per_channel(mean, channels),
        _per_channel(var, channels),
        batches,
        skipped,
        correction,
        wanted=wanted,
    )
    return y, moments, correction


def run_forward(
    layout: CallLayout,
    moments: int,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    batches: Tensor | None,
    skipped: Tensor | None,
    correction: Tensor | None,
    *,
    wanted: bool = True,
) -> Tensor:
    """y, of tensors that are known to be as the library reads them, and the moments to where they belong."""
    sizes, parameters, statistics, how, _ = layout
    y = torch.empty_like(x) if wanted else x
    # 0 stands for a tensor that is not there, 1 for one whose memory is not.
    record = _PACK(
        *sizes,
        x.data_ptr() or 1,
        0 if residual is None else residual.data_ptr() or 1,
        0 if mask is None else mask.data_ptr() or 1,
        0,
        y.data_ptr() if wanted else 0,
        0,
        0 if weight is None else weight.data_ptr() or 1,
        0 if bias is None else bias.data_ptr() or 1,
        0,
        0,
        *parameters,
        moments,
        moments + 8 * sizes[3] * sizes[5],
        0 if correction is None else correction.data_ptr() or 1,
        0 if mean is None else mean.data_ptr() or 1,
        0 if var is None else var.data_ptr() or 1,
        *statistics,
        0 if batches is None else batches.data_ptr() or 1,
        0 if skipped is None else skipped.data_ptr() or 1,
        *how,
    )
    run = _library().handle.bn_forward  # type: ignore[union-attr]
    status = run(record)
    if status:
        read = (x, residual, mask, weight, bias, correction, mean, var, batches, skipped)
        _not_done(run, status, record, *read)
    return y


def backward(
    dy: Tensor, saved: Saved, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (dx, dweight, dbias, dresidual) of `forward`, those that are wanted; y is given with a residual."""
    operands, y, moments, rule = saved
    x, weight, bias, _, mask = operands
    channels = x.shape[1]
    if rule.correction is not None:
        _check(rule.correction, 2 * rule.chunks * channels)
    like_x = _like(x, dy)
    assert like_x is not None
    return run_backward(
        layout_of(operands, NOTHING, rule),
        moments.data_ptr() if isinstance(moments, Tensor) else ctypes.addressof(moments),
        like_x,
        x,
        _per_channel(weight, channels),
        _per_channel(bias, channels),
        _like(x, y),
        _mask_bytes(x, mask),
        rule.correction,
        wanted=wanted,
    )


def run_backward(
    layout: CallLayout,
    moments: int,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    correction: Tensor | None,
    *,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients that are wanted, of tensors that are known to be as the library reads them."""
    sizes, parameters, statistics, how, _ = layout
    dx = torch.empty_like(x) if wanted[0] else None
    dweight = torch.empty_like(weight) if wanted[1] and weight is not None else None
    dbias = torch.empty_like(bias) if wanted[2] and bias is not None else None
    dresidual = torch.empty_like(x) if wanted[3] else None
    record = _PACK(
        *sizes,
        x.data_ptr() or 1,
        0 if y is None else y.data_ptr() or 1,
        0 if mask is None else mask.data_ptr() or 1,
        dy.data_ptr() or 1,
        0 if dx is None else dx.data_ptr(),
        0 if dresidual is None else dresidual.data_ptr(),
        0 if weight is None else weight.data_ptr() or 1,
        0 if bias is None else bias.data_ptr() or 1,
        0 if dweight is None else dweight.data_ptr(),
        0 if dbias is None else dbias.data_ptr(),
        *parameters,
        moments,
        moments + 8 * sizes[3] * sizes[5],
        0 if correction is None else correction.data_ptr() or 1,
        0,
        0,
        *statistics,
        0,
        0,
        *how,
    )
    run = _library().handle.bn_backward  # type: ignore[union-attr]
    status = run(record)
    if status:
        _not_done(run, status, record, x, y, mask, dy, weight, bias, correction)
    return dx, dweight, dbias, dresidual
