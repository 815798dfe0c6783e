"""One pass over a loader that records the moments of the layers' inputs, and what all processes saw in theirs."""

from __future__ import annotations

import functools
import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm import ops
from batchnorm.errors import DistributedError, InputError, UnsupportedError
from batchnorm.kernels import reference
from batchnorm.kernels.records import BatchMoments
from batchnorm.nn.running import active_set, epsilon_of
from batchnorm.processes import all_gather_objects
from batchnorm.statistics.changes import layer_name
from batchnorm.statistics.layers import Layers, Statistics
from batchnorm.statistics.moments import Moments

__all__ = ["LoaderPass", "PassResult", "gather_results", "in_order"]

MIN_BATCHES = 8
POOLED_AT_ONCE = 32

Order = tuple[str, ...]
"""The module paths of the layers that a batch used, in the order of first use."""


class PassResult(NamedTuple):
    """Moments by module path, the orders in which batches used the layers, uses per batch, and number of samples."""

    moments: dict[str, Moments]
    orders: list[Order]
    uses: Counter[str]
    samples: int


class _PooledMoments:
    """Moments of a layer's inputs. They are pooled 32 at a time, because pooling costs as much as a small forward."""

    def __init__(self) -> None:
        self._parts: list[BatchMoments] = []

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, batch: BatchMoments) -> None:
        self._parts.append(batch)
        if len(self._parts) >= POOLED_AT_ONCE:
            self.pooled()

    def pooled(self) -> Moments:
        if len(self._parts) > 1:
            self._parts = [reference.pooled(reference.stacked(self._parts))]
        return Moments.of_batch(self._parts[0])


@dataclass
class _StandardErrors:
    """Standard errors of a layer's mean and variance, from how these differ between batches (Welford 1962)."""

    batches: int = 0
    first_mean: Tensor | float = 0.0
    mean: Tensor | float = 0.0
    m2: Tensor | float = 0.0

    def add(self, batch: BatchMoments) -> None:
        self.first_mean = self.first_mean if self.batches else batch.mean
        self.batches += 1
        values = torch.stack((batch.mean, batch.var + (batch.mean - self.first_mean) ** 2))
        deviation = values - self.mean
        self.mean = self.mean + deviation / self.batches
        self.m2 = self.m2 + deviation * (values - self.mean)

    def within(self, tolerance: float, pooled: Moments, eps: float) -> bool:
        if self.batches < MIN_BATCHES:
            return False
        of_mean, of_var = torch.as_tensor(self.m2) / (self.batches - 1) / self.batches
        var = pooled.var() + eps
        return bool((of_mean <= tolerance**2 * var).all() and (of_var <= tolerance**2 * var**2).all())


class EnoughUses(BaseException):
    """Ends the forward of a batch once the measured layer has been used as often as in any batch."""


class LoaderPass:
    """Records of one pass over a loader; `record` is the hook that the layers' inputs go through.

    Parameters
    ----------
    layers : dict of Module
        The layers to measure.
    tolerance : float or None
        The pass has converged when all relative standard errors are below it.
    first_only : bool
        Measure only the layer that is used first.
    max_uses : int or None
        End the forward of a batch after the measured layer has been used this often.
    batch_statistics : bool
        Normalize each batch with its own statistics.
    """

    def __init__(
        self,
        layers: Layers,
        tolerance: float | None = None,
        *,
        first_only: bool = False,
        max_uses: int | None = None,
        batch_statistics: bool = False,
    ) -> None:
        self.layers, self.tolerance = layers, tolerance
        self.max_uses, self.batch_statistics = max_uses, batch_statistics
        self.domains = {path: active_set(layer).domain for path, layer in layers.items()}
        self.measured = {path: _PooledMoments() for path in (() if first_only else layers)}
        self.errors: defaultdict[str, _StandardErrors] = defaultdict(_StandardErrors)
        self.uses_of_batch: Counter[str] = Counter()
        self.orders: dict[Order, None] = {}  # a set that keeps the order of insertion
        self.uses: Counter[str] = Counter()
        self.samples = 0

    def record(self, path: str, x: Tensor, mask: Tensor | None) -> Statistics | None:
        """Record an input of the layer at a path; return its statistics if the layer is to normalize with them."""
        if active_set(self.layers[path]).domain != self.domains[path]:
            raise UnsupportedError(
                f"{layer_name(path)} must keep its domain during the forward; enter batchnorm.use_domain around the "
                "call instead"
            )
        self.uses_of_batch[path] += 1
        if not self.measured:
            self.measured[path] = _PooledMoments()
        if path not in self.measured:
            return None
        found = ops.moments(x, mask)
        self.measured[path].add(found)
        if self.tolerance is not None and found.count > 0:
            self.errors[path].add(found)
        if self.max_uses is not None and self.uses_of_batch[path] >= self.max_uses:
            raise EnoughUses
        return (found.mean, found.var) if self.batch_statistics and x.shape[0] > 1 else None

    def end_batch(self, samples: int) -> None:
        """Record that a batch of this number of samples has ended."""
        self.samples += samples
        self.orders[tuple(self.uses_of_batch)] = None
        self.uses |= self.uses_of_batch
        self.uses_of_batch.clear()

    def has_converged(self) -> bool:
        """Return whether the moments of every layer used are within the tolerance."""
        tolerance = self.tolerance
        if tolerance is None or not self.errors:
            return False
        return all(
            errors.within(tolerance, self.measured[path].pooled(), epsilon_of(self.layers[path]))
            for path, errors in self.errors.items()
        )

    def result(self) -> PassResult:
        """Return the records of this process."""
        moments = {path: each.pooled() for path, each in self.measured.items() if each}
        return PassResult(moments, list(self.orders), self.uses, self.samples)


def gather_results(
    local: PassResult, layers: Layers, group: dist.ProcessGroup | None, failure: Exception | None
) -> PassResult:
    """Return the result of a pass over all processes of the group; None is one process.

    Raises
    ------
    DistributedError
        The pass has failed on another process.
    InputError
        No process had a sample for a layer.
    Exception
        The failure on this process.
    """
    moments, orders, uses, samples = local
    if group is not None:
        told = (list(moments), orders, uses, samples, None if failure is None else repr(failure))
        ranks: list[tuple[Any, ...]] = all_gather_objects(told, group)
        for rank, (*_, error) in enumerate(ranks):
            if failure is None and error is not None:
                raise DistributedError(f"rank {rank} of the group failed, so nothing was changed: {error}")
        measured = dict.fromkeys(path for each in ranks for path in each[0])
        orders = [order for each in ranks for order in each[1]]
        uses = functools.reduce(operator.or_, (each[2] for each in ranks))
        samples = sum(each[3] for each in ranks)
    if failure is not None:
        raise failure
    if group is not None:
        means = {path: active_set(layers[path]).mean for path in measured}
        moments = {
            path: (moments.get(path) or Moments.empty(mean.numel(), mean.device)).all_reduce(group)
            for path, mean in means.items()
        }
    moments = {path: moments[path] for path in in_order(orders) if path in moments and moments[path].count > 0}
    if not moments or not samples:
        raise InputError("the loader must bring at least one sample to a layer with running statistics; got none")
    return PassResult(moments, orders, uses, samples)


def in_order(orders: Iterable[Sequence[str]]) -> list[str]:
    """Return the layers such that each follows those that a batch used before it.

    Layers without such a relation, and layers that batches use in contradictory orders, are in the order of first use.
    """
    followers: TopologicalSorter[str] = TopologicalSorter()
    orders = list(orders)
    for order in orders:
        for before, path in zip((None, *order), order, strict=False):
            followers.add(path, *([] if before is None else [before]))
    try:
        return list(followers.static_order())
    except CycleError:
        return list(dict.fromkeys(path for order in orders for path in order))
