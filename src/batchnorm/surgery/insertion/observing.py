"""The shapes and moments of what passes through places of a model, over an example or the batches of a loader."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.statistics.batches import BatchReader, device_of, moved
from batchnorm.statistics.forwards import restored
from batchnorm.statistics.moments import Moments
from batchnorm.surgery.examples import Example, check_example, run_example

__all__ = ["Batches", "Observed", "Observer"]


class Batches:
    """The inputs of a model that its user gives: one example, or the batches of a loader, which are read once.

    Attributes
    ----------
    first : tensor, tuple or mapping
        The first of them, as an example.

    Raises
    ------
    InputTypeError
        It is neither an example nor iterable, or a batch is none that a model can be given.
    InputError
        The loader is empty, or the model is lazy.
    """

    def __init__(self, model: nn.Module, example: Example | Iterable[Any]) -> None:
        self._batches: Iterator[Any] | None = None
        self.first: Example
        if isinstance(example, Tensor | tuple | Mapping | str | bytes | np.ndarray | nn.Module) or not isinstance(
            example, Iterable
        ):
            self.first = example  # type: ignore[assignment]
        else:
            batches = iter(example)
            try:
                batch = next(batches)
            except StopIteration:
                raise InputError("the loader that is given as example must bring a batch; got none") from None
            self._batches = itertools.chain([batch], batches)
            given = batch[0] if isinstance(batch, tuple | list) and batch else batch
            self.first = moved(given, device_of(model))
        check_example(model, self.first)

    def run(self, model: nn.Module, *, all_batches: bool) -> None:
        """Run the model in eval mode on the first batch, or on all.

        Raises
        ------
        InputTypeError, InputError
            The model does not take a batch.
        """
        with torch.no_grad(), restored(model):
            model.eval()
            if self._batches is None or not all_batches:
                run_example(model, self.first)
                return
            reader = BatchReader(model)
            for batch in self._batches:
                reader.run(batch)


@dataclass
class Observed:
    """What has passed through a place.

    Attributes
    ----------
    shape : Size or None
        Of the last tensor; None if there was none.
    moments : Moments or None
        Of all tensors; None if they were not asked for.
    """

    shape: torch.Size | None = None
    moments: Moments | None = None


class Observer(nn.Module):
    """Passes its input on, and notes its shape, and the moments of the channels where they have a dimension."""

    def __init__(self, observed: Observed, channel_dim: Callable[[torch.Size], int | None]) -> None:
        super().__init__()
        self._observed, self._channel_dim = observed, channel_dim

    def forward(self, x: Any) -> Any:
        """Return the input."""
        if isinstance(x, Tensor):
            seen, dim = self._observed, self._channel_dim(x.shape)
            seen.shape = x.shape
            if dim is not None:
                moments = Moments.of(x, dim)
                seen.moments = moments if seen.moments is None else seen.moments.merge(moments)
        return x
