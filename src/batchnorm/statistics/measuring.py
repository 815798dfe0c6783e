"""The inputs of a model's layers measured over a loader, all in one pass or layer by layer, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from batchnorm import ops
from batchnorm.errors import InputError
from batchnorm.nn.updates import no_stat_updates
from batchnorm.statistics.forwards import (
    Forward,
    batch_statistics,
    forward_pass,
    inputs_of,
    restored,
    running_statistics,
    samples_of,
    set_running_statistics,
    uncompiled,
)
from batchnorm.statistics.moments import Moments

__all__ = ["Measuring", "Statistics", "check_passes", "put_back_on_error", "ranks_of"]

FEWEST_BATCHES = 8

Statistics = tuple[Tensor, Tensor]
"""A mean and a variance (C,)."""

Settle = Callable[[str, TorchBatchNorm, Moments, int], Statistics]
"""The running statistics of the layer at a path, from the moments of its inputs and the number of samples."""


@contextmanager
def put_back_on_error(model: nn.Module, layers: Mapping[str, TorchBatchNorm]) -> Iterator[dict[str, Statistics]]:
    """Run the model in eval mode; whatever happens modes and random generators come back, on errors statistics too.

    Yields the running mean and variance of each layer as they were.
    """
    held = {path: running_statistics(layer) for path, layer in layers.items()}
    before = {path: (mean.clone(), var.clone()) for path, (mean, var) in held.items()}
    try:
        with torch.no_grad(), uncompiled(), restored(model):
            model.eval()
            yield before
    except BaseException:
        for path, layer in layers.items():
            set_running_statistics(layer, *before[path])
        raise


def check_passes(loader: Iterable[Any], passes: int, instead: str = "") -> None:
    """Raise `InputError` where a loader can't be gone through so often; ``instead`` ends the sentence."""
    if passes > 1 and isinstance(loader, Iterator):
        raise InputError(
            f"layer by layer the loader is gone through {passes} times; got {type(loader).__name__}, which can be "
            f"once: give a DataLoader or a list{instead}"
        )


class _Enough(BaseException):
    """The layer that is measured has been reached as often as it is used."""


class _Pass(NamedTuple):
    """Moments of the layers' inputs in the order of their use, how often a batch uses each, and the samples."""

    moments: dict[str, Moments]
    uses: dict[str, int]
    samples: int


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
class Measuring:
    """Measures layers and settles what their running statistics become.

    Attributes
    ----------
    settle : callable
        The statistics that are written, from what was measured.
    task : str
        For the progress bar.
    instead : str
        What else can be done with a loader that can't be gone through again, for the error.
    ranks : ProcessGroup or None
        Each rank reads its own share; all settle the same.
    samples : int
        Seen in the first pass, on this process.
    passes : int
        Over the loader.
    converged : bool
        Whether every pass so far ended by the tolerance.
    """

    model: nn.Module
    loader: Iterable[Any]
    settle: Settle
    forward: Forward | None = None
    max_samples: int | None = None
    tolerance: float | None = None
    progress: bool = False
    task: str = ""
    instead: str = ""
    ranks: dist.ProcessGroup | None = None
    samples: int = 0
    passes: int = 0
    converged: bool = True

    def at_once(self, layers: dict[str, TorchBatchNorm]) -> dict[str, Moments]:
        """One pass, in which all layers normalise each batch with its own statistics; moments by path."""
        with no_stat_updates(self.model), batch_statistics(layers.values()):
            found = self._pass(layers)
        for path in found.moments:
            self._commit(path, layers[path], found)
        return found.moments

    def layerwise(self, layers: dict[str, TorchBatchNorm]) -> dict[str, Moments]:
        """One pass a layer, each in the network with the layers before it settled; moments by path, in their order.

        The first pass finds the order of the layers, and how often each is used; the first one's input is right.
        """
        begun = self._pass(layers)
        first, *others = begun.moments
        found = {first: begun.moments[first]}
        if begun.uses[first] > 1:
            others = list(begun.moments)
        else:
            self._commit(first, layers[first], begun)
        check_passes(self.loader, 1 + len(others), self.instead)
        for path in others:
            layer, uses = layers[path], begun.uses[path]
            # What a layer's first use gives its second is normalised with the batch's own statistics.
            with no_stat_updates(layer), batch_statistics([layer] if uses > 1 else []):
                again = self._pass({path: layer}, until=uses)
            found[path] = again.moments[path]
            self._commit(path, layer, again)
        return found

    def _commit(self, path: str, layer: TorchBatchNorm, found: _Pass) -> None:
        """Write the statistics; where they can't serve raise."""
        set_running_statistics(layer, *self.settle(path, layer, found.moments[path], found.samples))
        for name, values in zip(("mean", "variance"), running_statistics(layer), strict=True):
            channels = values.isfinite().logical_not().nonzero().flatten().tolist()
            if channels:
                raise InputError(
                    f"the inputs of {path or 'the layer'} must have a finite {name}; got {values[channels[0]].item()} "
                    f"in {len(channels)} of {len(values)} channels"
                )

    def _pass(self, layers: dict[str, TorchBatchNorm], until: int | None = None) -> _Pass:
        """Measure layers, each until a batch has used it so often."""
        pooled: dict[str, Moments] = {}
        uses: dict[str, int] = {}
        settled = {path: _Settled() for path in layers}
        in_batch: dict[str, int] = {}

        def add(path: str, x: Tensor, mask: Tensor | None) -> None:
            moments = Moments.of_batch(ops.moments(x, mask))
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
        return self._of_all_ranks(_Pass(pooled, uses, samples), layers)

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
            yield bar.track(self.loader, description=f"{self.task}, pass {self.passes}")

    def _of_all_ranks(self, found: _Pass, layers: dict[str, TorchBatchNorm]) -> _Pass:
        pooled, uses, samples = found
        if self.ranks is not None:
            # A rank without data follows the order of one that has some.
            all_ranks: list[Any] = [None] * dist.get_world_size(self.ranks)
            dist.all_gather_object(all_ranks, (uses, samples), group=self.ranks)
            uses = max((each[0] for each in all_ranks), key=len)
            samples = sum(each[1] for each in all_ranks)
            device = running_statistics(next(iter(layers.values())))[0].device
            own = {path: pooled.get(path) or Moments.empty(layers[path].num_features, device) for path in uses}
            pooled = {path: moments.all_reduce(self.ranks) for path, moments in own.items()}
        pooled = {path: moments for path, moments in pooled.items() if moments.count > 0}
        if not pooled:
            raise InputError("the loader must give at least one sample to a layer that can be measured; got none")
        return _Pass(pooled, uses, samples)


def ranks_of(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group given, all processes where none is, or None where there is one process."""
    if group is not None or not (dist.is_available() and dist.is_initialized()):
        return group
    return dist.group.WORLD
