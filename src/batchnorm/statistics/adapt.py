"""Adaptation of running statistics to shifted data, at test time and without labels.

Schneider et al. (2020), "Improving robustness against common corruptions by covariate shift adaptation". With N the
prior, the number of samples that the stored statistics (s) count as, and n the number of samples of the new data (t)::

    mean = N / (N + n) mean_s + n / (N + n) mean_t        var = N / (N + n) var_s + n / (N + n) var_t
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm import ops
from batchnorm.checks import is_real
from batchnorm.errors import InputError
from batchnorm.nn.contexts import OpenContext
from batchnorm.nn.opening import end_with_layers, open_context
from batchnorm.nn.running import active_set
from batchnorm.reports import Block, Report
from batchnorm.statistics.batches import BatchReader, Device, Forward, Samples
from batchnorm.statistics.changes import LayerChange, change_table, changes, drift_summary
from batchnorm.statistics.forwards import uncompiled
from batchnorm.statistics.interrupts import defer_interrupts
from batchnorm.statistics.layers import Layers, Statistics, loaded, unfrozen_layers, variance_to_keep
from batchnorm.statistics.measuring import HIDING, Measuring, PassOptions, Replacement, check_passes, replacing
from batchnorm.statistics.moments import Moments
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["Adaptation", "adapt"]


@dataclass(frozen=True, eq=False, repr=False)
class Adaptation(Report):
    """The result of `adapt`; as a context manager it is undone at the end.

    Attributes
    ----------
    layers : tuple of LayerChange
        In the order in which they run; empty if each batch is adapted to by itself.
    samples : int or None
        Number of samples of all processes; None if each batch is adapted to by itself.
    prior : float
        Number of samples that the stored statistics count as.
    """

    layers: tuple[LayerChange, ...]
    samples: int | None
    prior: float
    _context: OpenContext
    _replacement: Replacement | None

    def undo(self) -> None:
        """End the adaptation, in all threads and tasks that have it; a second call does nothing."""
        self._context.leave()

    def keep(self) -> None:
        """Write the adapted statistics into the stored ones, for all threads and for checkpoints.

        This ends the adaptation, and cannot be undone. Layers frozen since stay as they are, with a warning.

        Raises
        ------
        InputError
            Each batch is adapted to by itself, or the adaptation has ended.
        """
        if self._replacement is None:
            raise InputError("only an adaptation to a loader has statistics to keep; this one adapts to each batch")
        if not self._context.is_open:
            raise InputError("an adaptation must be in force to be kept; this one has ended")
        with defer_interrupts():
            self._replacement.keep()

    def __enter__(self) -> Adaptation:
        if self._context.is_open:
            self._context.narrow()
            self._context.enter()
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _summary(self) -> str:
        data = "each batch" if self.samples is None else f"{self.samples:,} samples"
        return ", ".join([data, f"prior {self.prior:g}", *([drift_summary(self.layers)] if self.layers else [])])

    def _blocks(self) -> Iterable[Block]:
        if self.samples is None:
            yield f"each batch is adapted to by itself, with a prior of {self.prior:g} samples"
        else:
            share = self.samples / (self.samples + self.prior)
            yield change_table(self.layers)
            yield f"{self.samples:,} samples count {share:.0%}, with a prior of {self.prior:g}"

    def _records(self) -> list[dict[str, Any]]:
        return [asdict(layer) for layer in self.layers]


def adapt(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    prior: float = 16,
    forward: Forward | None = None,
    device: Device = None,
    samples: Samples = None,
    group: dist.ProcessGroup | None = None,
) -> Adaptation:
    """Use running statistics that are moved towards those of shifted data, without labels, until this is undone.

    Where the inputs have shifted (another camera, another hospital) and the labels given the features have not, much of
    a network's loss of accuracy comes from statistics that no longer fit (Schneider et al. 2020). The new statistics
    are the weighted mean of the stored ones, with weight ``prior``, and of those of the new data, with the number of
    samples as weight.

    With a loader, the layers are adapted to all of its samples, one layer after the other in the order in which they
    run, each measured in the network as adapted so far, in one pass over the loader per layer. Without a loader, each
    batch that the model is given in eval mode is adapted to by itself; a sample is then a row of the layer's input, and
    compiled models run eagerly until this is undone, those of other threads too.

    The stored statistics stay unchanged, in training as well. The adapted ones are in force in this thread and asyncio
    task until ``undo()`` or the end of ``with batchnorm.adapt(...):``; without ``with``, also in the rest of this
    thread after the task, or the notebook cell, has ended. A later adaptation replaces an earlier one while it lasts,
    and for good where nothing refers to the earlier `Adaptation` any more, as when a notebook cell is run again.

    Parameters
    ----------
    model : Module
        A model with layers of ours or torch's that keep running statistics. Frozen layers are left alone. The modes of
        modules, the random generators and the counts of batches stay unchanged, and after an error the statistics are
        restored.
    loader : iterable or None
        Batches, as for `recalibrate`; None adapts to each batch by itself.
    prior : float
        Number of samples that the stored statistics count as, at least 0. 16 suits batches of 16 samples and more; for
        single samples 64 to 256 is better.
    forward : callable or None
        ``forward(model, batch)``, for batches that are not tensors, tuples, lists or mappings.
    device, samples
        As for `recalibrate`.
    group : ProcessGroup or None
        Under torch.distributed, each process reads a share of the data, and all end with the same statistics.

    Returns
    -------
    Adaptation
        The change of each layer. ``undo()`` ends the adaptation, and ``keep()`` writes it into the stored statistics.

    Raises
    ------
    InputError
        The prior is negative, there is no layer to adapt, the loader is empty or can be consumed only once, or moments
        are not finite; with a prior of 0, there is a single value per channel. Or the samples of a batch cannot be
        counted.
    InputTypeError
        Batches need ``forward`` or ``samples``.
    UnsupportedError
        The model changes the domain of a layer in its forward.
    DistributedError
        The pass has failed on another process.

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
    if not is_real(prior) or not 0 <= prior < math.inf:
        raise InputError(f"prior must be a finite number of samples, at least 0; got {prior!r}")
    model = loaded(model)
    layers = unfrozen_layers(model)
    if loader is None:
        if any(option is not None for option in (forward, device, samples, group)):
            raise InputError(
                "forward, device, samples and group need a loader; got none, which adapts to each batch by itself"
            )
        return _lasting(Adaptation((), None, prior, _adapt_each_batch(layers, prior), None))
    check_passes(loader, len(layers))
    used = 0

    def new_statistics(path: str, layer: TorchBatchNorm, moments: Moments, seen: int) -> Statistics:
        nonlocal used
        used = seen
        return _weighted(path, layer, moments, seen, prior)

    reader, options = BatchReader(model, forward, device, samples), PassOptions(group=group)
    with replacing(model, layers) as replacement:
        moments = Measuring(reader, loader, new_statistics, options, replacement).layerwise(layers)
        _outlast(replacement.context, layers)
        report = changes(layers, moments, replacement.stored)
        return _lasting(Adaptation(report, used, prior, replacement.context, replacement))


def _weighted(path: str, layer: TorchBatchNorm, moments: Moments, samples: int, prior: float) -> Statistics:
    """Return the weighted mean, in float64, of the running statistics and the measured ones."""
    if prior == 0 and moments.count < 2:
        raise InputError(f"{path or 'the layer'} must see at least 2 values per channel if prior is 0; got 1")
    share = samples / (samples + prior)
    running = active_set(layer)
    mean, var = running.mean.double(), running.var.double()
    return mean + share * (moments.mean - mean), var + share * (variance_to_keep(layer, moments) - var)


def _adapt_each_batch(layers: Layers, prior: float) -> OpenContext:
    """Let the layers use adapted statistics for the duration of each forward, until the context is left."""

    @torch.no_grad()
    def adapted(path: str, layer: TorchBatchNorm, x: Tensor, mask: Tensor | None) -> Statistics | None:
        if layer.training or not x.shape[0]:
            return None
        moments = Moments.of_batch(ops.moments(x, mask))
        mean, var = _weighted(path, layer, moments, x.shape[0], prior)
        finite = mean.isfinite().all() & var.isfinite().all()  # a batch with NaN uses the stored statistics
        running = active_set(layer)
        return torch.where(finite, mean, running.mean), torch.where(finite, var, running.var)

    hooks = {layer: HIDING._replace(hook=partial(adapted, path)) for path, layer in layers.items()}
    eager = ExitStack()
    with defer_interrupts():
        eager.enter_context(uncompiled())
        context = open_context(hooks)
        context.at_end.append(eager.close)
        _outlast(context, layers)
    return context


def _lasting(adaptation: Adaptation) -> Adaptation:
    """End an adaptation that is deleted while a later one hides it: nobody could undo it any more."""
    finalizer = weakref.finalize(adaptation, adaptation._context.leave_if_hidden)
    finalizer.atexit = False
    return adaptation


def _outlast(context: OpenContext, layers: Layers) -> None:
    """Keep an adaptation without a ``with`` block in force until it is undone or the layers are deleted."""
    context.stay()
    end_with_layers(context, layers.values())
