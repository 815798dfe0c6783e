"""Recalibration: running statistics set to the moments of all the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch.distributed as dist
from torch import nn

from batchnorm.checks import is_real, is_whole
from batchnorm.errors import InputError
from batchnorm.reports import Block, Report
from batchnorm.statistics.batches import BatchReader, Device, Forward, Samples
from batchnorm.statistics.changes import LayerChange, change_table, changes, drift_summary
from batchnorm.statistics.layers import Statistics, loaded, unfrozen_layers, variance_to_keep
from batchnorm.statistics.measuring import Measuring, PassOptions, check_passes, replacing
from batchnorm.statistics.moments import Moments
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["Recalibration", "recalibrate"]

Mode = Literal["layerwise", "at_once"]
ALTERNATIVE = ", or use mode='at_once'"


@dataclass(frozen=True, repr=False)
class Recalibration(Report):
    """The result of `recalibrate`.

    Attributes
    ----------
    layers : tuple of LayerChange
        In the order in which they run.
    samples : int
        Number of samples seen in one pass over the loader, on this process.
    passes : int
        Number of passes over the loader.
    converged : bool or None
        Whether the tolerance ended every pass before the loader did; None without a tolerance.
    """

    layers: tuple[LayerChange, ...]
    samples: int
    passes: int
    converged: bool | None

    def _summary(self) -> str:
        return f"{self.samples:,} samples, {drift_summary(self.layers)}"

    def _blocks(self) -> Iterable[Block]:
        yield change_table(self.layers)
        yield f"{self.samples:,} samples, {self.passes} {'pass' if self.passes == 1 else 'passes'}"

    def _records(self) -> list[dict[str, Any]]:
        return [asdict(layer) for layer in self.layers]


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    device: Device = None,
    samples: Samples = None,
    mode: Mode = "layerwise",
    max_samples: int | None = None,
    tolerance: float | None = None,
    progress: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Recalibration:
    """Set running statistics to the moments of all the data, pooled exactly, each batch weighted by its size.

    Training leaves running statistics that stem from the last batches, while the weights changed (Wu & Johnson 2021,
    "Rethinking 'Batch' in BatchNorm"). The input of a layer depends on the statistics of the layers before it.
    ``mode="layerwise"`` therefore measures one layer after the other, each in the network as it will be used, in one
    pass over the loader per layer that ends at this layer. ``mode="at_once"`` takes a single pass, in which all layers
    normalize each batch with its own statistics, as in training; the smaller the batches, the more its result differs.

    Both leave the modes of all modules, the random generators, the counts of batches and torch's hooks unchanged. After
    any error, Ctrl-C included, the statistics are restored.

    Parameters
    ----------
    model : Module
        A model with layers of ours or torch's that keep running statistics. Frozen layers are left alone: ours by
        `freeze`, torch's in eval mode within a model in training mode.
    loader : iterable
        Batches: tensors, tuples or lists that begin with the input, or mappings of the model's arguments. They may
        differ in size. ``mode="layerwise"`` iterates over the loader several times.
    forward : callable or None
        ``forward(model, batch)``, for any other kind of batch.
    device : device or None
        Where batches are moved, nested ones too; None is the device of the model's parameters.
    samples : int, callable or None
        The number of samples of every batch, or a function that returns that of a batch. None counts the rows of the
        tensor that the model is given, or of all tensors of a batch where they have the same number; other batches
        raise an error.
    mode : {"layerwise", "at_once"}
    max_samples : int or None
        End a pass after this number of samples on each process; 1,000 to 10,000 are usually enough.
    tolerance : float or None
        End a pass when the standard errors of every channel's mean and variance are below this fraction of its standard
        deviation and its variance. They are estimated from the differences between batches, which must come in random
        order.
    progress : bool
        Show a progress bar on stderr; needs rich.
    group : ProcessGroup or None
        Under torch.distributed, each process reads a share of the data, and all end with the same statistics.

    Returns
    -------
    Recalibration
        The change of each layer; printing it shows a table.

    Raises
    ------
    InputError
        There is no layer to recalibrate, the loader is empty or can be consumed only once, moments are not finite, or
        the samples of a batch cannot be counted.
    InputTypeError
        Batches need ``forward`` or ``samples``.
    UnsupportedError
        The model changes the domain of a layer in its forward.
    DistributedError
        The pass has failed on another process.
    MissingDependencyError
        ``progress`` is True and rich is not installed.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> layer, rows = bn.BatchNorm1d(1), torch.arange(98.0).unsqueeze(1)
    >>> print(bn.recalibrate(layer, rows.split(96)))
    layer         values   drift before   drift after
    (the model)       98       1.58e+03             0
    98 samples, 1 pass
    >>> layer.running_mean
    tensor([48.5000])
    """
    model = loaded(model)
    layers = unfrozen_layers(model)
    _check_options(mode, max_samples, tolerance)
    if mode == "layerwise":
        check_passes(loader, len(layers), ALTERNATIVE)
    options = PassOptions(
        max_samples=max_samples,
        tolerance=tolerance,
        progress="recalibrating" if progress else None,
        alternative=ALTERNATIVE,
        group=group,
    )
    reader = BatchReader(model, forward, device, samples)
    with replacing(model, layers) as replacement:
        measuring = Measuring(reader, loader, _measured, options, replacement)
        moments = measuring.at_once(layers) if mode == "at_once" else measuring.layerwise(layers)
        report = Recalibration(
            layers=changes(layers, moments, replacement.stored),
            samples=measuring.samples,
            passes=measuring.passes,
            converged=None if tolerance is None else measuring.converged,
        )
        replacement.keep()
        return report


def _measured(path: str, layer: TorchBatchNorm, moments: Moments, samples: int) -> Statistics:
    """Return the mean and variance that were measured."""
    if moments.count < 2:
        raise InputError(f"{path or 'the layer'} must see at least 2 values per channel, to have a variance; got 1")
    return moments.mean, variance_to_keep(layer, moments)


def _check_options(mode: str, max_samples: int | None, tolerance: float | None) -> None:
    if mode not in get_args(Mode):
        raise InputError(f"mode must be {' or '.join(map(repr, get_args(Mode)))}; got {mode!r}")
    if max_samples is not None and not (is_whole(max_samples) and max_samples >= 1):
        raise InputError(f"max_samples must be None or a whole number of at least 1; got {max_samples!r}")
    if tolerance is not None and not (is_real(tolerance) and 0 < tolerance < 1):
        raise InputError(f"tolerance must be None or between 0 and 1; got {tolerance!r}")
