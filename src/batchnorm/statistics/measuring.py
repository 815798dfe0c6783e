"""The inputs of a model's layers measured over a loader, all in one pass or layer by layer, over all processes."""

from __future__ import annotations

import functools
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm import ops
from batchnorm.errors import DistributedError, InputError
from batchnorm.kernels import reference
from batchnorm.kernels.records import BatchMoments
from batchnorm.processes import all_gather_objects
from batchnorm.statistics.changes import named
from batchnorm.statistics.forwards import (
    Forward,
    Statistics,
    forward_pass,
    inputs_of,
    restored,
    running_names,
    running_statistics,
    samples_of,
    set_running_statistics,
    uncompiled,
)
from batchnorm.statistics.interrupts import held_back, let_through
from batchnorm.statistics.moments import Moments
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["Measuring", "check_passes", "put_back_on_error"]

FEWEST_BATCHES = 8
POOLED_AT_ONCE = 32

Settle = Callable[[str, TorchBatchNorm, Moments, int], Statistics]
"""The running statistics of the layer at a path, from the moments of its inputs and the number of samples."""


@contextmanager
def put_back_on_error(model: nn.Module, layers: Mapping[str, TorchBatchNorm]) -> Iterator[dict[str, Statistics]]:
    """Run the model in eval mode; whatever happens modes and random generators come back, on errors statistics too.

    Yields the running mean and variance of each layer as they were. Ctrl-C is held back but for `let_through`.
    """
    held = {path: running_statistics(layer) for path, layer in layers.items()}
    before = {path: (mean.clone(), var.clone()) for path, (mean, var) in held.items()}
    try:
        with held_back(), torch.no_grad(), uncompiled(), restored(model):
            model.eval()
            yield before
    except BaseException:
        with held_back():
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
    """What a pass saw: moments, in which orders batches used the layers, how often, and the samples."""

    moments: dict[str, Moments]
    orders: list[tuple[str, ...]]
    uses: Counter[str]
    samples: int


class _Pooled:
    """Moments of a layer's inputs; pooled by the dozens, since each time takes as long as a small batch's forward."""

    def __init__(self) -> None:
        self._parts: list[BatchMoments] = []

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, batch: BatchMoments) -> None:
        self._parts.append(batch)
        if len(self._parts) >= POOLED_AT_ONCE:
            self.whole()

    def whole(self) -> Moments:
        if len(self._parts) > 1:
            self._parts = [reference.pooled(reference.stacked(self._parts))]
        return Moments.of_batch(self._parts[0])


@dataclass
class _Settled:
    """Standard errors of a layer's mean and variance, from how its batches differ (Welford)."""

    batches: int = 0
    first: Tensor | float = 0.0
    mean: Tensor | float = 0.0
    m2: Tensor | float = 0.0

    def add(self, batch: BatchMoments) -> None:
        self.first = self.first if self.batches else batch.mean
        self.batches += 1
        seen = torch.stack((batch.mean, batch.var + (batch.mean - self.first) ** 2))
        away = seen - self.mean
        self.mean = self.mean + away / self.batches
        self.m2 = self.m2 + away * (seen - self.mean)

    def within(self, tolerance: float, pooled: Moments, eps: float) -> bool:
        if self.batches < FEWEST_BATCHES:
            return False
        of_mean, of_var = torch.as_tensor(self.m2) / (self.batches - 1) / self.batches
        var = pooled.var() + eps
        return bool((of_mean <= tolerance**2 * var).all() and (of_var <= tolerance**2 * var**2).all())


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
        found = self._pass(layers, own=True)
        for path in found.moments:
            self._commit(path, layers[path], found)
        return found.moments

    def layerwise(self, layers: dict[str, TorchBatchNorm]) -> dict[str, Moments]:
        """One pass a layer, each in the network with the layers before it settled; moments by path, in their order.

        The first pass finds the order, and how often each layer is used. What begins every batch is measured in it, as
        nothing before that can change its input.
        """
        begun = self._pass(layers, begin=True)
        order = _in_order(begun.orders)
        found = {}
        if begun.uses[order[0]] == 1 and all(each[0] == order[0] for each in begun.orders if each):
            found[order[0]] = begun.moments[order[0]]
            self._commit(order[0], layers[order[0]], begun)
        check_passes(self.loader, 1 + len(order) - len(found), self.instead)
        for path in order[len(found) :]:
            # What a layer's first use gives its second is normalised with the batch's own statistics.
            again = self._pass({path: layers[path]}, until=begun.uses[path], own=begun.uses[path] > 1)
            found[path] = again.moments[path]
            self._commit(path, layers[path], again)
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

    def _pass(
        self, layers: dict[str, TorchBatchNorm], *, begin: bool = False, until: int | None = None, own: bool = False
    ) -> _Pass:
        """Measure layers, or the one alone that begins; each until a batch has used it so often.

        With ``own`` a batch is normalised with its own statistics.
        """
        domains = {path: running_names(layer) for path, layer in layers.items()}
        pooled = {path: _Pooled() for path in (() if begin else layers)}
        settled: defaultdict[str, _Settled] = defaultdict(_Settled)
        in_batch: Counter[str] = Counter()
        orders: dict[tuple[str, ...], None] = {}  # a set that keeps its order
        uses: Counter[str] = Counter()
        samples, done, failed = 0, False, None

        def add(path: str, x: Tensor, mask: Tensor | None) -> Statistics | None:
            if running_names(layers[path]) != domains[path]:
                raise InputError(
                    f"{named(path)} must keep its domain; have batchnorm.use_domain around the call, not within"
                )
            in_batch[path] += 1
            if not pooled:
                pooled[path] = _Pooled()
            if path not in pooled:
                return None
            found = ops.moments(x, mask)
            pooled[path].add(found)
            if self.tolerance is not None and found.count > 0:
                settled[path].add(found)
            if until is not None and in_batch[path] >= until:
                raise _Enough
            return (found.mean, found.var) if own and x.shape[0] > 1 else None

        self.passes += 1
        with inputs_of(layers, add), self._batches() as batches:
            try:
                with let_through():
                    for batch in batches:
                        in_batch.clear()
                        with suppress(_Enough):
                            forward_pass(self.model, batch, self.forward)
                        samples += samples_of(batch)
                        orders[tuple(in_batch)] = None
                        uses |= in_batch
                        done = self._settled(settled, pooled, layers)
                        if done or (self.max_samples is not None and samples >= self.max_samples):
                            break
            except Exception as error:  # noqa: BLE001 (the other ranks must hear of it; then it is raised)
                failed = error
        self.samples = samples if self.passes == 1 else self.samples
        self.converged = self.converged and done
        moments = {path: each.whole() for path, each in pooled.items() if each}
        return _of_all_ranks(_Pass(moments, list(orders), uses, samples), layers, self.ranks, failed)

    def _settled(
        self, settled: dict[str, _Settled], pooled: dict[str, _Pooled], layers: dict[str, TorchBatchNorm]
    ) -> bool:
        """Whether the moments of every layer seen are within the tolerance."""
        tolerance = self.tolerance
        if tolerance is None or not settled:
            return False
        return all(each.within(tolerance, pooled[path].whole(), layers[path].eps) for path, each in settled.items())

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


def _of_all_ranks(
    own: _Pass, layers: dict[str, TorchBatchNorm], ranks: dist.ProcessGroup | None, failed: Exception | None
) -> _Pass:
    """What the pass saw on all processes; where it failed on one it fails on all."""
    moments, orders, uses, samples = own
    if ranks is not None:
        said = None if failed is None else repr(failed)
        told = all_gather_objects((list(moments), orders, uses, samples, said), ranks)
        for rank, (*_, error) in enumerate(told):
            if failed is None and error is not None:
                raise DistributedError(f"rank {rank} of the group failed, and so nothing was changed: {error}")
        measured = dict.fromkeys(path for each in told for path in each[0])
        orders = [order for each in told for order in each[1]]
        uses = functools.reduce(operator.or_, (each[2] for each in told))
        samples = sum(each[3] for each in told)
    if failed is not None:
        raise failed
    if ranks is not None:
        device = running_statistics(next(iter(layers.values())))[0].device
        moments = {
            path: (moments.get(path) or Moments.empty(layers[path].num_features, device)).all_reduce(ranks)
            for path in measured
        }
    moments = {path: moments[path] for path in _in_order(orders) if path in moments and moments[path].count > 0}
    if not moments:
        raise InputError("the loader must give at least one sample to a layer that can be measured; got none")
    return _Pass(moments, orders, uses, samples)


def _in_order(orders: list[tuple[str, ...]]) -> list[str]:
    """The layers such that each comes after those that some batch used before it; first seen first, else."""
    follow: TopologicalSorter[str] = TopologicalSorter()
    for order in orders:
        for before, path in zip((None, *order), order, strict=False):
            follow.add(path, *([] if before is None else [before]))
    try:
        return list(follow.static_order())
    except CycleError:  # batches use the layers in contrary orders
        return list(dict.fromkeys(path for order in orders for path in order))
