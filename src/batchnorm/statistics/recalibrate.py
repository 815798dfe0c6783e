"""Running statistics put right: those of all the data, in a network as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from batchnorm.errors import InputError
from batchnorm.nn.updates import no_stat_updates
from batchnorm.statistics.distance import symmetrised_kl
from batchnorm.statistics.forwards import (
    Forward,
    batch_statistics,
    forward_pass,
    inputs_of,
    kept_variance,
    restored,
    running_statistics,
    samples_of,
    set_running_statistics,
    statistics_layers,
    uncompiled,
    unwrapped,
)
from batchnorm.statistics.moments import Moments

__all__ = ["LayerChange", "Recalibration", "recalibrate"]

MODES = ("layerwise", "at_once")
FEWEST_BATCHES = 8


@dataclass(frozen=True)
class LayerChange:
    """What recalibration did to a layer.

    Attributes
    ----------
    path : str
        The layer's.
    count : int
        Values that each channel was measured on.
    before, after : float
        Distance of the running statistics from what was measured: symmetrised Kullback-Leibler divergence of the two
        normal distributions, in nats, the mean over channels.
    """

    path: str
    count: int
    before: float
    after: float


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
        width = max(len("layer"), *(len(layer.path or "(the model)") for layer in self.layers))
        lines = [f"{'layer':<{width}}  {'values':>12}  {'drift before':>12}  {'after':>9}"]
        lines += [
            f"{layer.path or '(the model)':<{width}}  {layer.count:>12,}  {layer.before:>12.3g}  {layer.after:>9.2g}"
            for layer in self.layers
        ]
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        return "\n".join([*lines, f"{self.samples:,} samples, {passes}"])


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
        End a pass when the standard error of every channel's mean, found from how the batches differ, is below this
        part of its standard deviation.
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
    run = _Run(model, loader, forward, max_samples, tolerance, progress, _ranks(group))
    before = {path: tuple(v.clone() for v in running_statistics(layer)) for path, layer in layers.items()}
    try:
        with torch.no_grad(), uncompiled(), restored(model):
            model.eval()
            found = run.at_once(layers) if mode == "at_once" else run.layerwise(layers)
    except BaseException:
        for path, layer in layers.items():
            set_running_statistics(layer, *before[path])
        raise
    changes = tuple(_change(path, layers[path], moments, *before[path]) for path, moments in found.items())
    return Recalibration(changes, run.samples, run.passes, run.converged if tolerance is not None else None)


def _check(
    mode: str,
    max_samples: int | None,
    tolerance: float | None,
    loader: Iterable[Any],
    layers: dict[str, TorchBatchNorm],
) -> None:
    if mode not in MODES:
        raise InputError(f"mode must be {' or '.join(map(repr, MODES))}; got {mode!r}")
    if max_samples is not None and max_samples < 1:
        raise InputError(f"max_samples must be None or at least 1; got {max_samples!r}")
    if tolerance is not None and not 0 < tolerance < 1:
        raise InputError(f"tolerance must be None or between 0 and 1; got {tolerance!r}")
    if mode == "layerwise":
        _check_passes(loader, len(layers))


def _check_passes(loader: Iterable[Any], passes: int) -> None:
    if passes > 1 and isinstance(loader, Iterator):
        raise InputError(
            f"layer by layer the loader is gone through {passes} times; got {type(loader).__name__}, which can be "
            "once: give a DataLoader or a list, or mode='at_once'"
        )


class _Enough(BaseException):
    """The layer that is measured has been reached as often as it is used."""


@dataclass
class _Settled:
    """The standard error of a layer's mean, from the means of its batches (Welford)."""

    batches: int = 0
    mean: Tensor | float = 0.0
    m2: Tensor | float = 0.0

    def add(self, mean: Tensor) -> None:
        self.batches += 1
        away = mean - self.mean
        self.mean = self.mean + away / self.batches
        self.m2 = self.m2 + away * (mean - self.mean)

    def within(self, tolerance: float, pooled: Moments, eps: float) -> bool:
        if self.batches < FEWEST_BATCHES:
            return False
        error = torch.as_tensor(self.m2) / (self.batches - 1) / self.batches
        return bool((error <= tolerance**2 * (pooled.var() + eps)).all())


@dataclass
class _Run:
    model: nn.Module
    loader: Iterable[Any]
    forward: Forward | None
    max_samples: int | None
    tolerance: float | None
    progress: bool
    ranks: dist.ProcessGroup | None
    samples: int = 0
    passes: int = 0
    converged: bool = True

    def at_once(self, layers: dict[str, TorchBatchNorm]) -> dict[str, Moments]:
        with no_stat_updates(self.model), batch_statistics(layers.values()):
            found, _ = self._pass(layers)
        for path, moments in found.items():
            _commit(path, layers[path], moments)
        return found

    def layerwise(self, layers: dict[str, TorchBatchNorm]) -> dict[str, Moments]:
        """The first pass finds the order of the layers, and how often each is used; the first one's input is right."""
        measured, uses = self._pass(layers)
        first, *others = measured
        found = {first: measured[first]}
        if uses[first] > 1:
            others = list(measured)
        else:
            _commit(first, layers[first], measured[first])
        _check_passes(self.loader, 1 + len(others))
        for path in others:
            layer = layers[path]
            # What a layer's first use gives its second is normalised with the batch's own statistics.
            with no_stat_updates(layer), batch_statistics([layer] if uses[path] > 1 else []):
                again, _ = self._pass({path: layer}, until=uses[path])
            found[path] = again[path]
            _commit(path, layer, again[path])
        return found

    def _pass(
        self, layers: dict[str, TorchBatchNorm], until: int | None = None
    ) -> tuple[dict[str, Moments], dict[str, int]]:
        """Moments of each layer's inputs in the order of their use, over all ranks, and how often a batch uses it."""
        pooled: dict[str, Moments] = {}
        uses: dict[str, int] = {}
        settled = {path: _Settled() for path in layers}
        in_batch: dict[str, int] = {}

        def add(path: str, moments: Moments) -> None:
            pooled[path] = moments if path not in pooled else pooled[path].merge(moments)
            if self.tolerance is not None and moments.count > 0:
                settled[path].add(moments.mean)
            in_batch[path] = in_batch.get(path, 0) + 1
            if until is not None and in_batch[path] >= until:
                raise _Enough

        self.passes += 1
        samples, done = 0, self.tolerance is None
        with inputs_of(layers, add), self._batches() as batches:
            for batch in batches:
                in_batch.clear()
                with suppress(_Enough):
                    forward_pass(self.model, batch, self.forward)
                samples += samples_of(batch)
                uses |= {path: max(count, uses.get(path, 0)) for path, count in in_batch.items()}
                if pooled and self.tolerance is not None:
                    done = all(settled[path].within(self.tolerance, pooled[path], layers[path].eps) for path in pooled)
                    if done:
                        break
                if self.max_samples is not None and samples >= self.max_samples:
                    break
        self.samples = samples if self.passes == 1 else self.samples
        self.converged = self.converged and done
        return self._of_all_ranks(pooled, uses, layers)

    @contextmanager
    def _batches(self) -> Iterator[Iterable[Any]]:
        if not self.progress:
            yield self.loader
            return
        try:
            from rich.console import Console
            from rich.progress import Progress
        except ImportError as error:
            raise InputError("progress=True needs rich, which pip install 'batchnorm[lab]' brings") from error
        with Progress(console=Console(stderr=True), transient=True) as bar:
            yield bar.track(self.loader, description=f"recalibrating, pass {self.passes}")

    def _of_all_ranks(
        self, pooled: dict[str, Moments], uses: dict[str, int], layers: dict[str, TorchBatchNorm]
    ) -> tuple[dict[str, Moments], dict[str, int]]:
        if self.ranks is not None:
            # A rank without data follows the order of one that has some.
            orders: list[Any] = [None] * dist.get_world_size(self.ranks)
            dist.all_gather_object(orders, uses, group=self.ranks)
            uses = max(orders, key=len)
            device = running_statistics(next(iter(layers.values())))[0].device
            own = {path: pooled.get(path) or Moments.empty(layers[path].num_features, device) for path in uses}
            pooled = {path: moments.all_reduce(self.ranks) for path, moments in own.items()}
        pooled = {path: moments for path, moments in pooled.items() if moments.count > 0}
        if not pooled:
            raise InputError("the loader must give at least one sample to a layer that can be recalibrated; got none")
        return pooled, uses


def _ranks(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    if group is not None or not (dist.is_available() and dist.is_initialized()):
        return group
    return dist.group.WORLD


def _commit(path: str, layer: TorchBatchNorm, moments: Moments) -> None:
    """Write the statistics; where they can't serve raise, and `recalibrate` then puts back what was there."""
    if moments.count < 2:
        raise InputError(f"{path or 'the layer'} must see at least 2 values a channel, to have a variance; got 1")
    set_running_statistics(layer, moments.mean, kept_variance(layer, moments))
    for name, values in zip(("mean", "variance"), running_statistics(layer), strict=True):
        channels = values.isfinite().logical_not().nonzero().flatten().tolist()
        if channels:
            raise InputError(
                f"the inputs of {path or 'the layer'} must have a finite {name}; got {values[channels[0]].item()} in "
                f"{len(channels)} of {len(values)} channels"
            )


def _change(path: str, layer: TorchBatchNorm, moments: Moments, mean: Tensor, var: Tensor) -> LayerChange:
    kept = kept_variance(layer, moments)

    def distance(mean: Tensor, var: Tensor) -> float:
        return float(symmetrised_kl(mean.double(), var.double() + layer.eps, moments.mean, kept + layer.eps).mean())

    return LayerChange(path, int(moments.count), distance(mean, var), distance(*running_statistics(layer)))
