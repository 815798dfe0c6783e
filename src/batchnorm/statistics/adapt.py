"""Running statistics moved towards shifted data, at test time and without labels.

Schneider et al. (2020), "Improving robustness against common corruptions by covariate shift adaptation". With N the
prior, a number of samples that the stored statistics (s) are worth, and n the samples of the new data (t)::

    mean = N / (N + n) mean_s + n / (N + n) mean_t        var = N / (N + n) var_s + n / (N + n) var_t
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm import ops
from batchnorm.errors import InputError
from batchnorm.processes import process_group_of
from batchnorm.statistics.changes import LayerChange, changes, table
from batchnorm.statistics.forwards import (
    Forward,
    Statistics,
    inputs_of,
    kept_variance,
    running_names,
    running_statistics,
    statistics_layers,
    uncompiled,
    unwrapped,
)
from batchnorm.statistics.measuring import Measuring, check_passes, put_back_on_error
from batchnorm.statistics.moments import Moments
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["Adaptation", "adapt"]


@dataclass(frozen=True, eq=False)
class Adaptation:
    """What `adapt` did; prints as a table. As a context manager it is undone at the end.

    Attributes
    ----------
    layers : tuple of LayerChange
        In the order in which they run; none where each batch is adapted to.
    samples : int or None
        Of all processes; None where each batch is adapted to.
    prior : float
        Samples that the statistics from before count as.
    """

    layers: tuple[LayerChange, ...]
    samples: int | None
    prior: float
    _undo: ExitStack = field(repr=False)

    def undo(self) -> None:
        """Put the running statistics back that were there before; once undone, nothing more."""
        self._undo.close()

    def __enter__(self) -> Adaptation:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        if self.samples is None:
            return f"each batch is adapted to, with a prior of {self.prior:g} samples"
        share = self.samples / (self.samples + self.prior)
        return table(self.layers, f"{self.samples:,} samples count {share:.0%}, with a prior of {self.prior:g}")


def adapt(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    prior: float = 16,
    forward: Forward | None = None,
    group: dist.ProcessGroup | None = None,
) -> Adaptation:
    """Move running statistics towards those of shifted data; no label is needed, and it can be undone.

    Where inputs have shifted (another camera, another hospital) and the labels given the features have not, much of
    what a network loses comes from statistics that no longer fit (Schneider et al. 2020). They become the mean of the
    stored ones and those of the new data, weighted by ``prior`` and by the number of samples.

    With a loader the layers are adapted to all of its samples, one after the other in the order in which they run, each
    measured in the network as it is adapted so far: a pass for each layer. Without one each batch that the model is
    given in eval mode is adapted to by itself, the stored statistics staying as they are; a sample is then a row of the
    layer's input. Until that is undone, what torch.compile has compiled runs as it is written.

    Parameters
    ----------
    model : Module
        With layers of ours or torch's that keep running statistics; frozen ones are left alone. Modes of modules,
        random generators and counts of batches are as before, and where anything fails the statistics too.
    loader : iterable or None
        Of batches, as for `recalibrate`; None adapts to each batch.
    prior : float
        Samples that the stored statistics count as, from 0. 16 suits batches of 16 and more; for single samples 64 to
        256 is better.
    forward : callable or None
        ``forward(model, batch)`` for batches that are no tensors, tuples, lists or mappings.
    group : ProcessGroup or None
        Where torch.distributed is initialised each rank reads its own share, and all end with the same statistics.

    Returns
    -------
    Adaptation
        What moved, layer by layer; ``undo()`` leads back, or ``with batchnorm.adapt(...):``.

    Raises
    ------
    InputError
        A prior below 0, no layer to adapt, an empty loader, one that can't be gone through again, a batch without
        ``forward``, moments that are not finite; with a prior of 0 a single value a channel.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> layer, shifted = bn.BatchNorm1d(1).eval(), torch.full((48, 1), 10.0)
    >>> with bn.adapt(layer, [shifted]):
    ...     layer.running_mean
    tensor([7.5000])
    >>> layer.running_mean
    tensor([0.])
    """
    if not isinstance(prior, int | float) or not 0 <= prior < math.inf:
        raise InputError(f"prior must be a finite number of samples from 0; got {prior!r}")
    model = unwrapped(model)
    layers = statistics_layers(model)
    if loader is None:
        if forward is not None or group is not None:
            raise InputError("forward and group go with a loader; got none, which adapts to each batch by itself")
        return Adaptation((), None, prior, _adapt_each_batch(layers, prior))
    check_passes(loader, len(layers))
    samples = 0

    def settle(path: str, layer: TorchBatchNorm, moments: Moments, seen: int) -> Statistics:
        nonlocal samples
        samples = seen
        return _between(path, layer, moments, seen, prior)

    with put_back_on_error(model, layers) as before:
        found = Measuring(model, loader, settle, forward, task="adapting", ranks=process_group_of(group)).layerwise(
            layers
        )
        undo = ExitStack()
        for path in found:
            undo.callback(_write, layers[path], running_names(layers[path]), before[path])
        return Adaptation(changes(layers, found, before), samples, prior, undo)


def _between(path: str, layer: TorchBatchNorm, moments: Moments, samples: int, prior: float) -> Statistics:
    """Mean and variance between the running ones and those measured, in float64."""
    if prior == 0 and moments.count < 2:
        raise InputError(f"{path or 'the layer'} must see at least 2 values a channel where prior is 0; got 1")
    share = samples / (samples + prior)
    mean, var = (values.double() for values in running_statistics(layer))
    return mean + share * (moments.mean - mean), var + share * (kept_variance(layer, moments) - var)


@torch.no_grad()
def _write(layer: TorchBatchNorm, names: tuple[str, str], values: Statistics) -> None:
    for name, value in zip(names, values, strict=True):
        layer.get_buffer(name).copy_(value)


def _adapt_each_batch(layers: dict[str, TorchBatchNorm], prior: float) -> ExitStack:
    """Let the layers use other statistics for the time of each forward; closing the stack ends it."""

    @torch.no_grad()
    def adapted(path: str, x: Tensor, mask: Tensor | None) -> Statistics | None:
        layer = layers[path]
        if layer.training or not x.shape[0]:
            return None
        moments = Moments.of_batch(ops.moments(x, mask))
        mean, var = _between(path, layer, moments, x.shape[0], prior)
        finite = mean.isfinite().all() & var.isfinite().all()  # a batch with a NaN is not adapted to
        stored = running_statistics(layer)
        return torch.where(finite, mean, stored[0]), torch.where(finite, var, stored[1])

    undo = ExitStack()
    undo.enter_context(uncompiled())
    undo.enter_context(inputs_of(layers, adapted))
    return undo
