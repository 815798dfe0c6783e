"""Batches of a loader: how many samples each has, their move to the model's device, and the forward pass over one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from batchnorm.checks import is_whole
from batchnorm.errors import InputError, InputTypeError

__all__ = ["BatchReader", "Device", "Forward", "Samples", "moved"]

Forward = Callable[[nn.Module, Any], object]
"""Runs a model on one batch of a loader."""

Device = torch.device | str | int | None
"""A device as torch takes it; None is the device of the model."""

Samples = int | Callable[[Any], int] | None
"""The number of samples of every batch, or a function that returns that of a batch; None counts them."""

WAY_OUT = "pass samples=, a whole number or a function of the batch, as in samples=lambda batch: len(batch.y)"


class BatchReader:
    """Counts the samples of batches, moves them to the model's device, and runs the model on them.

    Parameters
    ----------
    model : Module
    forward : callable or None
        ``forward(model, batch)``; None gives the model a tensor as it is, the first element of a tuple or list, and all
        values of a mapping by name.
    device : device or None
        The batches are moved to this device; None is that of the model's parameters.
    samples : int, callable or None
        The number of samples of each batch, or a function of the batch as the loader yields it; None counts them.

    Raises
    ------
    InputError
        The device is none of torch's, or the number of samples is negative.
    InputTypeError
        ``samples`` is neither a whole number nor a function.
    """

    def __init__(
        self, model: nn.Module, forward: Forward | None = None, device: Device = None, samples: Samples = None
    ) -> None:
        self.model, self.forward, self.samples = model, forward, samples
        self.device = device_of(model) if device is None else _checked_device(device)
        self._rows: int | None = None
        if samples is not None and not callable(samples):
            _checked_count(samples, "samples must be None, a whole number or a function of the batch", 1)

    def count(self, batch: Any) -> int:
        """Return the number of samples of a batch.

        Raises
        ------
        InputError
            The tensors of the batch differ in their first sizes, or ``samples`` is or returns a negative number.
        InputTypeError
            The batch holds no tensor, or objects whose content is unknown, or ``samples`` returns no whole number.
        """
        self._rows = None
        if self.forward is None:
            _check_takes(batch)
        if callable(self.samples):
            return _checked_count(self.samples(batch), "samples must return a whole number for every batch")
        if self.samples is not None:
            return int(self.samples)
        if self.forward is None and isinstance(batch, tuple | list):
            batch = batch[0]  # the model is given no other
        sizes = {_first_size(array) for array in _arrays(batch)}
        if not sizes:
            raise InputTypeError(
                f"samples are counted in tensors with a first size; got {type(batch).__name__} without one: {WAY_OUT}"
            )
        if len(sizes) > 1:
            raise InputError(
                "samples are counted where all tensors of a batch have the same first size; got the sizes "
                f"{', '.join(map(str, sorted(sizes)))} in {type(batch).__name__}: {WAY_OUT}"
            )
        (size,) = sizes
        if _may_list_samples(batch):
            self._rows = size
        return size

    def check_rows(self, rows: int) -> None:
        """Raise `InputError` if the tensors in a list may be one sample each, because a layer sees other rows.

        Parameters
        ----------
        rows : int
            First size of the input of the layer that the batch reaches first.
        """
        expected, self._rows = self._rows, None
        if expected is not None and rows != expected:
            raise InputError(
                f"samples are counted where every tensor of a batch has a row per sample; got tensors with {expected} "
                f"rows in a list, and a layer that is given {rows}: {WAY_OUT}"
            )

    def run(self, batch: Any) -> Any:
        """Move the batch to the device, run the model on it, and return the output.

        Raises
        ------
        InputTypeError
            The batch is no tensor, mapping, or tuple or list that begins with a tensor, and there is no ``forward``.
        """
        if self.forward is None:
            _check_takes(batch)
            batch = batch[0] if isinstance(batch, tuple | list) else batch
        batch = moved(batch, self.device)
        if self.forward is not None:
            return self.forward(self.model, batch)
        return self.model(**batch) if isinstance(batch, Mapping) else self.model(batch)


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of the first parameter or buffer that is not on meta; None if there is none."""
    tensors = (*model.parameters(), *model.buffers())
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), None)


def moved(batch: Any, device: torch.device | None) -> Any:
    """Return the batch with everything that has a method ``to`` on the device; None leaves all where they are.

    Mappings, sequences and dataclasses keep their types, and are copied where something in them moves. The batch of
    the loader is not changed, unless a ``to`` of the user's changes its object.
    """
    if device is None or isinstance(batch, str | bytes | np.ndarray):
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=device.type not in ("cpu", "mps"))  # there, reads would not wait
    if callable(getattr(batch, "to", None)) and not isinstance(batch, type):
        arrived = batch.to(device)
        return batch if arrived is None else arrived  # a `to` that moves in place may return nothing
    if isinstance(batch, Mapping):
        return _with_items(batch, {key: moved(value, device) for key, value in batch.items()})
    if isinstance(batch, tuple):
        values = [moved(value, device) for value in batch]
        if all(value is before for value, before in zip(values, batch, strict=True)):
            return batch
        return batch._make(values) if hasattr(batch, "_make") else type(batch)(values)
    if isinstance(batch, MutableSequence):
        return _with_items(batch, {i: moved(value, device) for i, value in enumerate(batch)})
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return _with_fields(batch, {name: moved(value, device) for name, value in _fields(batch)})
    return batch


def _with_items(batch: Any, values: Mapping[Any, Any]) -> Any:
    if all(values[key] is batch[key] for key in values):
        return batch
    if not isinstance(batch, MutableMapping | MutableSequence):
        return dict(values)  # a mapping that cannot be written to
    batch = copy.copy(batch)
    for key, value in values.items():
        batch[key] = value
    return batch


def _with_fields(batch: Any, values: Mapping[str, Any]) -> Any:
    if all(value is getattr(batch, name) for name, value in values.items()):
        return batch
    batch = copy.copy(batch)
    for name, value in values.items():
        object.__setattr__(batch, name, value)  # the dataclass may be frozen
    return batch


def _fields(batch: Any) -> Iterator[tuple[str, Any]]:
    return (
        (field.name, getattr(batch, field.name)) for field in dataclasses.fields(batch) if hasattr(batch, field.name)
    )


def _parts(batch: Any) -> list[Any] | None:
    """Return the values that a structure consists of; None for anything else."""
    if isinstance(batch, Mapping):
        return list(batch.values())
    if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
        return list(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [value for _, value in _fields(batch)]
    return None


def _arrays(batch: Any) -> list[Any]:
    """Return the tensors and arrays that have a first size; raise `InputTypeError` at an object of another kind."""
    if isinstance(batch, Tensor | np.ndarray):
        return [batch] if batch.ndim else []
    if isinstance(batch, PackedSequence):
        return [batch.data.new_empty(int(batch.batch_sizes[0]), 0)]  # a row per sequence
    parts = _parts(batch)
    if parts is not None:
        return [array for part in parts for array in _arrays(part)]
    if batch is None or isinstance(batch, str | bytes | int | float | complex | np.generic):
        return []
    raise InputTypeError(
        f"samples are counted in tensors, arrays, tuples, lists, mappings and dataclasses; got {type(batch).__name__}: "
        f"{WAY_OUT}"
    )


def _may_list_samples(batch: Any) -> bool:
    """Return whether a tuple or list has several parts alike, which may be inputs side by side or one sample each."""
    parts = _parts(batch) or []
    if isinstance(batch, tuple | list):
        ranks = [tuple(array.ndim for array in _arrays(part)) for part in parts]
        if len(ranks) > 1 and ranks[0] and len(set(ranks)) == 1:
            return True
    return any(_may_list_samples(part) for part in parts)


def _first_size(array: Any) -> int:
    return int(array.size(0) if isinstance(array, Tensor) else array.shape[0])


def _check_takes(batch: Any) -> None:
    """Raise `InputTypeError` unless the model can be given the batch without a ``forward``."""
    is_sequence = isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence)
    if isinstance(batch, Tensor | Mapping) or (is_sequence and batch and isinstance(batch[0], Tensor)):
        return
    raise InputTypeError(
        "a batch must be a tensor, a tuple or list that begins with one, or a mapping; got "
        f"{type(batch).__name__}. For other batches pass forward=, a function of model and batch, and samples=, a "
        "number or a function of the batch, where their samples cannot be counted"
    )


def _checked_count(value: Any, rule: str, least: int = 0) -> int:
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if not is_whole(value):
        raise InputTypeError(f"{rule}; got {value!r}")
    if value < least:
        raise InputError(f"{rule}, at least {least}; got {value!r}")
    return int(value)


def _checked_device(device: Any) -> torch.device:
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:  # torch without CUDA asserts that it has it
        raise InputError(f"device must be None or a device of this machine, as in 'cuda:0'; got {device!r}") from error
    if found.type == "meta":
        raise InputError(f"device must be one that holds values; got {device!r}")
    return found
