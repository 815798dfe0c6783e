"""The CPU kernels of native.cpp, called with tensors.

A tensor is handed over as a pointer and one of two layouts, (N, C, L) contiguous or rows of channels (channels last,
and (N, C)). `ready` brings a tensor into one of them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from batchnorm import torch_internals
from batchnorm.errors import InputError
from batchnorm.kernels.call import DTYPES, CallLayout, pack_backward, pack_forward
from batchnorm.kernels.library import library
from batchnorm.kernels.records import Gradients, MomentsBuffer, Operands, Rule, Running

__all__ = [
    "are_unwrapped",
    "backward",
    "can_read",
    "can_update",
    "check_counts",
    "forward",
    "is_ready",
    "moments",
    "ready",
    "run_backward",
    "run_forward",
    "supports",
]

Statistics = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""The running mean, var, batches and skipped of a call: a plain tuple, which is faster to make than a `Running`."""

UNWRAPPED = (Tensor, torch.nn.Parameter)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
NO_RUNNING = Running(update=False)
NO_STORAGE = 2
"""The status of a call that has done nothing, because a tensor seems to have no memory."""


def are_unwrapped(*tensors: Tensor | None) -> bool:
    """Return whether these are torch's own tensors with values of their own, not wrappers of other tensors."""
    return all(
        values is None
        or (
            type(values) in UNWRAPPED
            and torch_internals.has_storage(values)
            and not torch_internals.is_functional(values)
        )
        for values in tensors
    )


def supports(x: Tensor) -> bool:
    """Return whether the kernels take tensors of this device, dtype and kind."""
    return x.is_cpu and x.dtype in DTYPES and x.layout is torch.strided and _is_materialized(x)


def _is_materialized(values: Tensor) -> bool:
    """Return whether memory holds the values; torch may leave it to the reader to negate them, or to read zeros."""
    return not (values.is_neg() or torch_internals.is_zero_tensor(values))


def is_ready(x: Tensor) -> bool:
    """Return whether the kernels can read the tensor where it is."""
    kind = CHANNELS_LAST.get(x.dim())
    return x.is_contiguous() or (kind is not None and x.is_contiguous(memory_format=kind))


def ready(x: Tensor) -> Tensor:
    """Return the tensor itself where the kernels can read it, else a dense copy of the layout that y will have."""
    if is_ready(x):
        return x
    kind = CHANNELS_LAST.get(x.dim())
    return x.contiguous(
        memory_format=kind if kind is not None and _is_like_channels_last(x) else torch.contiguous_format
    )


def _is_like_channels_last(x: Tensor) -> bool:
    """Return whether torch's layer would give a y with channels last: for a crop of such a batch, not where unclear."""
    sizes, strides = x.shape, x.stride()
    least = 0
    if strides[1] == 0:
        return False
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):  # from the values next to each other to those far apart
        if sizes[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * max(sizes[dim], 1)
    return True


def can_update(running: Running) -> bool:
    """Return whether the kernels can write the running statistics where they are."""
    mean, var, batches, skipped = running.mean, running.var, running.batches, running.skipped
    return (
        (mean is None or (mean.is_contiguous() and mean.dtype in DTYPES))
        and (var is None or (var.is_contiguous() and var.dtype in DTYPES))
        and (batches is None or batches.dtype == torch.int64)
        and (skipped is None or skipped.dtype == torch.int64)
    )


def can_read(x: Tensor, like_x: Sequence[Tensor | None], per_channel: Sequence[Tensor | None]) -> bool:
    """Return whether the library can read all these where they are, x being `ready`."""
    return all(values is None or _is_like(x, values) for values in like_x) and all(
        _per_channel(values, x.shape[1]) is values for values in per_channel
    )


def check_counts(running: Running) -> None:
    """Raise `InputError` unless each count is one number."""
    for count in (running.batches, running.skipped):
        if count is not None:
            _check(count, 1)


def _check(values: Tensor, size: int) -> None:
    """Raise `InputError` unless the library may read or write so many values where these are."""
    if values.is_cpu and values.numel() == size:
        return
    if not values.is_cpu:
        raise InputError(f"all tensors must be on the input's device, cpu; got one on {values.device}")
    raise InputError(f"expected {size} values; got shape {tuple(values.shape)}")


def _is_like(x: Tensor, values: Tensor) -> bool:
    """Return whether the values have the dtype and layout of x."""
    _check(values, x.numel())
    return values.stride() == x.stride() and values.dtype == x.dtype and _is_materialized(values)


def _like(x: Tensor, values: Tensor) -> Tensor:
    """Return the values in the dtype and layout of x."""
    if _is_like(x, values):
        return values
    kind = torch.contiguous_format if x.is_contiguous() else CHANNELS_LAST[x.dim()]
    return _materialized(values).to(x.dtype).contiguous(memory_format=kind)


def _materialized(values: Tensor) -> Tensor:
    return values if _is_materialized(values) else values.clone()


def _per_channel(values: Tensor | None, channels: int) -> Tensor | None:
    """Return the values of the channels, one after the other in memory."""
    if values is None:
        return None
    _check(values, channels)
    return _materialized(values).contiguous()


def _mask_bytes(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return the mask with one byte per position."""
    if mask is None:
        return None
    _check(mask, mask.numel())  # expand checks its sizes
    return mask.expand(x.shape[0], *x.shape[2:]).contiguous()


@functools.cache
def _function(name: str) -> Callable[[bytes], int]:
    """Return a function of the library."""
    function: Callable[[bytes], int] = getattr(library().handle, name)
    return function


def _profiled(name: str) -> Callable[[bytes], int]:
    """Return a function of the library which a profiler records under the name of the operator that does the same."""
    return torch.profiler.record_function(name.replace("bn_", "batchnorm::"))(_function(name))


def forward(operands: Operands, running: Running, rule: Rule) -> tuple[Tensor, Tensor, Tensor | None]:
    """Normalize a batch whose x is `ready`; in training update the running statistics, which the kernels `can_update`.

    Returns
    -------
    y : Tensor
    moments : Tensor, shape (2, C) or (2, chunks, C)
        The mean and biased variance used: the batch's own in training, else the running ones.
    correction : Tensor or None
        The r and d of batch renormalization, of the same shape.
    """
    return _forward(operands, running, rule, wanted=True)


def moments(x: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """Return mean and biased variance of x, which is `ready`: (2, C), or (2, chunks, C) for virtual batches."""
    return _forward(Operands(x, mask=mask), NO_RUNNING, rule, wanted=False)[1]


def _forward(operands: Operands, running: Running, rule: Rule, *, wanted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Do as `forward`; without ``wanted`` y is x, and only the moments are computed."""
    x, weight, bias, residual, mask = operands
    channels, correction = x.shape[1], rule.correction
    layout = CallLayout.of(operands, running, rule)
    check_counts(running)
    if correction is not None:
        _check(correction, 2 * rule.chunks * channels)
    elif rule.limits is not None:
        correction = torch.empty(*layout.moments_shape, dtype=torch.float64, device="cpu")
    # A tuple of sizes would take half as long again; the default device may be another.
    moments = torch.empty(*layout.moments_shape, dtype=torch.float64, device="cpu")
    mean = moments.data_ptr()
    y = run_forward(
        layout.pack(),
        mean,
        mean + layout.var_offset,
        Operands(
            x,
            _per_channel(weight, channels),
            _per_channel(bias, channels),
            None if residual is None else _like(x, residual),
            _mask_bytes(x, mask),
        ),
        (
            _per_channel(running.mean, channels),
            _per_channel(running.var, channels),
            running.batches,
            running.skipped,
        ),
        correction,
        wanted=wanted,
    )
    return y, moments, correction


def run_forward(
    constants: bytes,
    mean: int,
    var: int,
    operands: Operands,
    statistics: Statistics,
    correction: Tensor | None,
    *,
    wanted: bool = True,
) -> Tensor:
    """Return y, computed from tensors that the library is known to read where they are.

    ``constants`` are a packed `CallLayout`, ``mean`` and ``var`` the addresses where the moments are written. Without
    ``wanted`` y is x, and only the moments are computed.
    """
    x, weight, bias, residual, mask = operands
    running_mean, running_var, batches, skipped = statistics
    y = torch.empty_like(x) if wanted else x
    # 0 stands for an absent tensor, 1 for one that has no memory.
    record = pack_forward(
        constants,
        x=x.data_ptr() or 1,
        other=0 if residual is None else residual.data_ptr() or 1,
        mask=0 if mask is None else mask.data_ptr() or 1,
        out=y.data_ptr() if wanted else 0,
        weight=0 if weight is None else weight.data_ptr() or 1,
        bias=0 if bias is None else bias.data_ptr() or 1,
        mean=mean,
        var=var,
        renorm=0 if correction is None else correction.data_ptr() or 1,
        running_mean=0 if running_mean is None else running_mean.data_ptr() or 1,
        running_var=0 if running_var is None else running_var.data_ptr() or 1,
        batches=0 if batches is None else batches.data_ptr() or 1,
        skipped=0 if skipped is None else skipped.data_ptr() or 1,
    )
    call = _profiled if torch_internals.profiler_is_active() else _function
    status = call("bn_forward")(record)
    if status:
        _retry(_function("bn_forward"), status, record, (*operands, *statistics, correction))
    return y


def backward(
    dy: Tensor,
    operands: Operands,
    moments: Tensor | MomentsBuffer,
    rule: Rule,
    *,
    y: Tensor | None = None,
    wanted: Sequence[bool],
) -> Gradients:
    """Return the gradients of `forward` that are wanted, those of x, weight, bias and residual.

    y, where there was a residual, stands for it: its sign tells the activation's derivative.
    """
    x, mask, channels = operands.x, operands.mask, operands.x.shape[1]
    if rule.correction is not None:
        _check(rule.correction, 2 * rule.chunks * channels)
    layout = CallLayout.of(operands, NO_RUNNING, rule)
    mean = moments.data_ptr() if isinstance(moments, Tensor) else ctypes.addressof(moments)
    gradients = run_backward(
        layout.pack(),
        mean,
        mean + layout.var_offset,
        _like(x, dy),
        Operands(
            x,
            _per_channel(operands.weight, channels),
            _per_channel(operands.bias, channels),
            None,
            _mask_bytes(x, mask),
        ),
        rule.correction,
        y=None if y is None else _like(x, y),
        wanted=wanted,
    )
    return Gradients(*gradients)


def run_backward(
    constants: bytes,
    mean: int,
    var: int,
    dy: Tensor,
    operands: Operands,
    correction: Tensor | None,
    *,
    y: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients that are wanted, computed from tensors that the library is known to read where they are.

    The arguments are those of `run_forward`; y is given where there was a residual.
    """
    x, weight, bias, _, mask = operands
    dx = torch.empty_like(x) if wanted[0] else None
    dweight = torch.empty_like(weight) if wanted[1] and weight is not None else None
    dbias = torch.empty_like(bias) if wanted[2] and bias is not None else None
    dresidual = torch.empty_like(x) if wanted[3] else None
    record = pack_backward(
        constants,
        x=x.data_ptr() or 1,
        other=0 if y is None else y.data_ptr() or 1,
        mask=0 if mask is None else mask.data_ptr() or 1,
        dy=dy.data_ptr() or 1,
        out=0 if dx is None else dx.data_ptr(),
        dresidual=0 if dresidual is None else dresidual.data_ptr(),
        weight=0 if weight is None else weight.data_ptr() or 1,
        bias=0 if bias is None else bias.data_ptr() or 1,
        dweight=0 if dweight is None else dweight.data_ptr(),
        dbias=0 if dbias is None else dbias.data_ptr(),
        mean=mean,
        var=var,
        renorm=0 if correction is None else correction.data_ptr() or 1,
    )
    call = _profiled if torch_internals.profiler_is_active() else _function
    status = call("bn_backward")(record)
    if status:
        _retry(_function("bn_backward"), status, record, (dy, *operands, y, correction))
    return dx, dweight, dbias, dresidual


def _retry(function: Callable[[bytes], int], status: int, record: bytes, tensors: Sequence[Tensor | None]) -> None:
    """Raise an error that says why the library has done nothing, or call it once more where it was wrong.

    It refuses addresses below a minimum; where all tensors have their memory, this process has memory below that.
    """
    if status == NO_STORAGE:
        for values in tensors:
            if values is not None and values.numel() and values.untyped_storage().data_ptr() == 0:
                shape = tuple(values.shape)
                raise InputError(f"tensors must have their values in memory; that of one of shape {shape} was freed")
        library().handle.bn_set_min_address(0)  # type: ignore[union-attr]
        status = function(record)
    if status:
        raise MemoryError("the native kernels found no memory for the sums of the channels")
