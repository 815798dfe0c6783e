"""Running statistics put right: those of all the data, in a network as it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from batchnorm.errors import InputError
from batchnorm.processes import process_group_of
from batchnorm.statistics.changes import LayerChange, changes, table
from batchnorm.statistics.forwards import Forward, Statistics, kept_variance, statistics_layers, unwrapped
from batchnorm.statistics.measuring import Measuring, check_passes, put_back_on_error
from batchnorm.statistics.moments import Moments
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["Recalibration", "recalibrate"]

MODES = ("layerwise", "at_once")
AT_ONCE = ", or mode='at_once'"


@dataclass(frozen=True)
class Recalibration:
    """What `recalibrate` did; prints as a table.

    Attributes
    ----------
    layers : tuple of LayerChange
        In the order in which they run.
    samples : int
        Seen in one pass over the loader, on this process.
    passes : int
        Over the loader.
    converged : bool or None
        Whether the statistics settled before the loader ended; None where no tolerance was given.
    """

    layers: tuple[LayerChange, ...]
    samples: int
    passes: int
    converged: bool | None

    def __str__(self) -> str:
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        return table(self.layers, f"{self.samples:,} samples, {passes}")


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    mode: str = "layerwise",
    max_samples: int | None = None,
    tolerance: float | None = None,
    progress: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Recalibration:
    """Set running statistics to the moments of all the data, pooled exactly, each batch by its count of values.

    The running mean that training leaves is one of the last batches, while the weights moved (Wu & Johnson 2021,
    "Rethinking 'Batch' in BatchNorm"). A layer's input depends on the statistics of the layers before it, so what is
    right is one layer after the other, each measured in the network as it will be used: ``mode="layerwise"``, one pass
    over the loader for each layer, which ends at that layer. ``mode="at_once"`` takes one pass, in which all layers
    normalise each batch with its own statistics, as in training; what it finds differs the more, the smaller the
    batches are. Both leave the modes of all modules, the random generators and torch's hooks as they were, and counts
    of batches too; where anything fails, Ctrl-C included, the statistics are what they were.

    Parameters
    ----------
    model : Module
        With layers of ours or torch's that keep running statistics. Frozen ones are left alone: ours by `freeze`,
        torch's in eval mode within a model in training mode.
    loader : iterable
        Of batches: tensors, tuples or lists that begin with the input, mappings of the model's arguments. Batches may
        differ in size. Layer by layer it is gone through several times.
    forward : callable or None
        ``forward(model, batch)`` for any other kind of batch.
    mode : str
        "layerwise" or "at_once".
    max_samples : int or None
        End a pass after as many samples, on each process; 1,000 to 10,000 are usually enough. A batch has as many as
        its first tensor has rows, and counts as one where there is no tensor to be seen.
    tolerance : float or None
        End a pass when the standard errors of every channel's mean and variance, found from how the batches differ, are
        below this part of its standard deviation and of its variance. Batches must come in random order.
    progress : bool
        Show a progress bar on stderr; needs rich.
    group : ProcessGroup or None
        Where torch.distributed is initialised each rank reads its own share, and all end with the same statistics.

    Returns
    -------
    Recalibration
        What moved, layer by layer; print it.

    Raises
    ------
    InputError
        No layer to recalibrate, an empty loader, one that can't be gone through again, a batch without ``forward``,
        moments that are not finite.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> layer, rows = bn.BatchNorm1d(1), torch.arange(98.0).unsqueeze(1)
    >>> print(bn.recalibrate(layer, rows.split(96)))
    layer              values  drift before      after
    (the model)            98           790          0
    98 samples, 1 pass
    >>> layer.running_mean
    tensor([48.5000])
    """
    model = unwrapped(model)
    layers = statistics_layers(model)
    _check(mode, max_samples, tolerance, loader, layers)
    run = Measuring(
        model,
        loader,
        _measured,
        forward,
        max_samples,
        tolerance,
        progress,
        task="recalibrating",
        instead=AT_ONCE,
        ranks=process_group_of(group),
    )
    with put_back_on_error(model, layers) as before:
        found = run.at_once(layers) if mode == "at_once" else run.layerwise(layers)
        moved = changes(layers, found, before)
        return Recalibration(moved, run.samples, run.passes, run.converged if tolerance is not None else None)


def _measured(path: str, layer: TorchBatchNorm, moments: Moments, samples: int) -> Statistics:
    if moments.count < 2:
        raise InputError(f"{path or 'the layer'} must see at least 2 values a channel, to have a variance; got 1")
    return moments.mean, kept_variance(layer, moments)


def _check(
    mode: str,
    max_samples: int | None,
    tolerance: float | None,
    loader: Iterable[Any],
    layers: dict[str, TorchBatchNorm],
) -> None:
    if mode not in MODES:
        raise InputError(f"mode must be {' or '.join(map(repr, MODES))}; got {mode!r}")
    if max_samples is not None and (not isinstance(max_samples, int) or max_samples < 1):
        raise InputError(f"max_samples must be None or a whole number of at least 1; got {max_samples!r}")
    if tolerance is not None and not (isinstance(tolerance, float) and 0 < tolerance < 1):
        raise InputError(f"tolerance must be None or between 0 and 1; got {tolerance!r}")
    if mode == "layerwise":
        check_passes(loader, len(layers), AT_ONCE)
