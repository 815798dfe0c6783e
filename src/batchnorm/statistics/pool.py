"""Pooling of the running statistics that each process has gathered by itself."""

from __future__ import annotations

from itertools import zip_longest
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.errors import DistributedError, InputError
from batchnorm.kernels import reference
from batchnorm.kernels.records import BatchMoments
from batchnorm.nn.running import RunningSet, running_sets
from batchnorm.processes import all_gather, all_gather_objects, group_size
from batchnorm.statistics.layers import unfrozen_layers, unwrapped

__all__ = ["pool_running_stats"]

_BATCHES_POOLED: WeakKeyDictionary[nn.Module, dict[str | None, int]] = WeakKeyDictionary()
"""Count of batches of each layer and domain at the last pooling. It is in no state dict, pickle or copy."""


class _Entry(NamedTuple):
    """One set of running statistics to pool: that of a layer or of one of its domains."""

    name: str
    running: RunningSet
    batches: int

    def counts_since_pooling(self) -> tuple[int, int]:
        """Return the samples and batches since the last pooling; all batches if their count was reset meanwhile."""
        before = _BATCHES_POOLED.get(self.running.layer, {}).get(self.running.domain, 0)
        samples = self.running.samples
        batches = self.batches - before if self.batches >= before else self.batches
        return 0 if samples is None else int(samples), batches


def pool_running_stats(model: nn.Module, group: dist.ProcessGroup | None = None, *, samples: int | None = None) -> None:
    """Give every process the running statistics of all processes, pooled exactly; all end with the same bits.

    Each process is weighted by the number of samples that it has trained on since the last pooling. The pooled
    variance includes the differences between the processes' means, by the law of total variance: ``var = sum_r share_r
    (var_r + (mean_r - mean)^2)``. The count of batches (``num_batches_tracked``) stays that of the process. Frozen
    layers are left alone, and so are statistics that no process has updated since the last pooling.

    Parameters
    ----------
    model : Module
        The same on every process. Under DistributedDataParallel, ``broadcast_buffers`` must be False; pass the wrapper
        itself, because only it tells.
    group : ProcessGroup or None
        None is all processes. Without torch.distributed there is one process, and nothing to pool.
    samples : int or None
        Number of samples that this process has trained on since the last pooling, its weight in all layers. None takes
        the count that each layer of ours keeps, per domain, in this process. Torch's layers count only batches, which
        weights processes correctly if their batches have the same size. Either all processes must give it, or none.

    Raises
    ------
    InputError
        The model has no layer to pool, ``broadcast_buffers`` is True, ``samples`` is negative, or statistics are not
        finite.
    DistributedError
        Processes have different layers (frozen ones do not count), or only some have given ``samples``. Like
        statistics that are not finite, this is raised on all processes, and nothing is changed.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> model = torch.nn.Linear(2, 3), bn.BatchNorm1d(3)
    >>> bn.pool_running_stats(torch.nn.Sequential(*model))  # a single process: nothing to pool
    """
    for path, module in model.named_modules():
        if isinstance(module, DistributedDataParallel) and module.broadcast_buffers:
            raise InputError(
                f"{path or 'the model'} must be DistributedDataParallel(..., broadcast_buffers=False); with True, the "
                "running statistics of rank 0 overwrite the others at each forward, and there is nothing left to pool"
            )
    if samples is not None and samples < 0:
        raise InputError(f"samples must be None or at least 0; got {samples!r}")
    entries = _entries(unwrapped(model))
    if group_size(group) == 1:
        return
    _check_same(entries, group)
    given, *columns = _gathered(entries, samples, group)
    if given.min() != given.max():
        raise DistributedError(
            f"samples must be given by all ranks or by none; got it from {int(given.sum())} of {len(given)} ranks"
        )
    means, variances, counts = columns[::3], columns[1::3], columns[2::3]
    found = [
        BatchMoments(mean, var, by_samples if by_samples.any() else by_batches)
        for mean, var, (by_samples, by_batches) in zip(means, variances, (each.T for each in counts), strict=True)
    ]
    for entry, ranks in zip(entries, found, strict=True):
        _check_finite(entry, ranks)
    for entry, ranks in zip(entries, found, strict=True):
        _write(entry, ranks)


def _entries(model: nn.Module) -> list[_Entry]:
    return [
        _Entry(
            f"{path or 'the layer'}{'' if running.domain is None else f', domain {running.domain}'}",
            running,
            0 if running.batches is None else int(running.batches),
        )
        for path, layer in unfrozen_layers(model).items()
        for running in running_sets(layer)
    ]


def _check_same(entries: list[_Entry], group: dist.ProcessGroup | None) -> None:
    local = [(entry.name, len(entry.running.mean)) for entry in entries]
    for rank, theirs in enumerate(all_gather_objects(local, group)):
        if theirs != local:
            here, there = next((a, b) for a, b in zip_longest(local, theirs, fillvalue="none") if a != b)
            raise DistributedError(
                f"all ranks must have the same layers with statistics to pool; rank {rank} of the group has {there}, "
                f"this one {here}"
            )


def _gathered(entries: list[_Entry], samples: int | None, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Return the values of all ranks.

    The first are whether ranks gave samples (R, 1); then follow for each entry the means and variances (R, C), and the
    counts of samples and batches (R, 2).
    """
    parts = [torch.tensor([float(samples is not None)])]
    for entry in entries:
        counts = entry.counts_since_pooling() if samples is None else (samples, 0)
        parts += entry.running.mean, entry.running.var, torch.tensor(counts)
    device = entries[0].running.mean.device
    local = torch.cat([part.detach().to(device, torch.float64) for part in parts])
    return list(torch.split(all_gather(local, group), [len(part) for part in parts], dim=1))


def _check_finite(entry: _Entry, ranks: BatchMoments) -> None:
    finite = ranks.mean.isfinite().all(1) & ranks.var.isfinite().all(1)
    counts = torch.as_tensor(ranks.count) > 0
    if not bool((finite | ~counts).all()):
        rank = int((counts & ~finite).nonzero()[0])
        raise InputError(
            f"running statistics must be finite to be pooled; got NaN or infinite values from rank {rank}, of "
            f"{entry.name}"
        )


def _write(entry: _Entry, ranks: BatchMoments) -> None:
    running = entry.running
    if bool((torch.as_tensor(ranks.count) > 0).any()):
        pooled = reference.pooled(ranks)
        running.write(pooled.mean, pooled.var)
    _BATCHES_POOLED.setdefault(running.layer, {})[running.domain] = entry.batches
    if running.samples is not None:
        running.samples.zero_()
