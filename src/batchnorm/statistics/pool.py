"""One set of running statistics for all processes, from those that each has gathered by itself."""

from __future__ import annotations

from itertools import zip_longest
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.errors import InputError
from batchnorm.kernels import reference
from batchnorm.kernels.records import BatchMoments
from batchnorm.processes import all_gather, all_gather_objects, group_size
from batchnorm.statistics.forwards import statistics_layers, suffixes_of, unwrapped

__all__ = ["pool_running_stats"]

_POOLED: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()
"""How many batches a layer, and each of its domains, had seen when last pooled; in no state dict, pickle or copy."""


class _Held(NamedTuple):
    """One set of running statistics: a layer's, or one of its domains'."""

    layer: nn.Module
    name: str
    suffix: str
    mean: Tensor
    var: Tensor
    batches: int
    samples: Tensor | None

    def since(self) -> tuple[int, int]:
        """Samples and batches since the last pooling; all batches where the count has been reset meanwhile."""
        return 0 if self.samples is None else int(self.samples), self._batches_since()

    def _batches_since(self) -> int:
        before = _POOLED.get(self.layer, {}).get(self.suffix, 0)
        return self.batches - before if self.batches >= before else self.batches


def pool_running_stats(model: nn.Module, group: dist.ProcessGroup | None = None, *, samples: int | None = None) -> None:
    """Give every rank the running statistics of all ranks, pooled at once; all end with the same bits.

    Each rank weighs as many samples as it has trained on since the last pooling. The pooled variance has the spread of
    the ranks' means in it, by the law of total variance: ``var = sum_r share_r (var_r + (mean_r - mean)^2)``. What
    counts batches (``num_batches_tracked``) stays each rank's own; frozen layers are left alone; a set of statistics
    that no rank has moved since the last pooling stays as it is.

    Parameters
    ----------
    model : Module
        The same on every rank. Under DistributedDataParallel with ``broadcast_buffers=False``, and best the wrapper
        itself, as the model within can't tell how it is wrapped.
    group : ProcessGroup or None
        None is all ranks. Where torch.distributed is not initialised there is one, and nothing to pool.
    samples : int or None
        How many samples this rank has trained on since the last pooling, as its weight in all layers. None takes what
        each layer of ours, and each domain, has counted in this process; of torch's layers, which count batches alone,
        these, which is right where the ranks' batches have the same size. All ranks must give it, or none.

    Raises
    ------
    InputError
        No layer to pool, broadcast_buffers=True, samples below 0 or given by some ranks only, ranks with other layers
        (a frozen one counts for none), statistics that are not finite. Nothing is changed then; the last three are
        raised on all ranks.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> model = torch.nn.Linear(2, 3), bn.BatchNorm1d(3)
    >>> bn.pool_running_stats(torch.nn.Sequential(*model))  # a single process: nothing to pool
    """
    for path, module in model.named_modules():
        if isinstance(module, DistributedDataParallel) and module.broadcast_buffers:
            raise InputError(
                f"{path or 'the model'} must be DistributedDataParallel(..., broadcast_buffers=False): with True rank "
                "0's running statistics overwrite the others' at each forward, and there is nothing left to pool"
            )
    if samples is not None and samples < 0:
        raise InputError(f"samples must be None or at least 0; got {samples!r}")
    sets = _sets(unwrapped(model))
    if group_size(group) == 1:
        return
    _check_same(sets, group)
    given, *columns = _gathered(sets, samples, group)
    if given.min() != given.max():
        raise InputError(
            f"samples must be given by all ranks or by none; got it from {int(given.sum())} of {len(given)} ranks"
        )
    means, variances, counts = columns[::3], columns[1::3], columns[2::3]
    found = [
        BatchMoments(mean, var, by_samples if by_samples.any() else by_batches)
        for mean, var, (by_samples, by_batches) in zip(means, variances, (each.T for each in counts), strict=True)
    ]
    for held, ranks in zip(sets, found, strict=True):
        _check_finite(held, ranks)
    for held, ranks in zip(sets, found, strict=True):
        _commit(held, ranks)


def _sets(model: nn.Module) -> list[_Held]:
    return [
        _Held(
            layer,
            f"{path or 'the layer'}{suffix and f', domain {suffix[1:]}'}",
            suffix,
            layer.get_buffer(f"running_mean{suffix}"),
            layer.get_buffer(f"running_var{suffix}"),
            int(layer.get_buffer(f"num_batches_tracked{suffix}")),
            layer._buffers.get(f"samples_seen{suffix}"),
        )
        for path, layer in statistics_layers(model).items()
        for suffix in suffixes_of(layer)
    ]


def _check_same(sets: list[_Held], group: dist.ProcessGroup | None) -> None:
    own = [(held.name, len(held.mean)) for held in sets]
    for rank, theirs in enumerate(all_gather_objects(own, group)):
        if theirs != own:
            here, there = next((a, b) for a, b in zip_longest(own, theirs, fillvalue="none") if a != b)
            raise InputError(
                f"all ranks must have the same layers with statistics to pool; rank {rank} of the group has {there}, "
                f"this one {here}"
            )


def _gathered(sets: list[_Held], samples: int | None, group: dist.ProcessGroup | None) -> list[Tensor]:
    """By rank whether it gave samples (R, 1); of each set mean and variance (R, C), samples and batches (R, 2)."""
    device = sets[0].mean.device
    parts = [torch.tensor([float(samples is not None)])]
    for held in sets:
        counts = held.since() if samples is None else (samples, 0)
        parts += held.mean, held.var, torch.tensor(counts)
    own = torch.cat([part.detach().to(device, torch.float64) for part in parts])
    return list(torch.split(all_gather(own, group), [len(part) for part in parts], dim=1))


def _check_finite(held: _Held, ranks: BatchMoments) -> None:
    finite = ranks.mean.isfinite().all(1) & ranks.var.isfinite().all(1)
    counts = torch.as_tensor(ranks.count) > 0
    if not bool((finite | ~counts).all()):
        rank = int((counts & ~finite).nonzero()[0])
        raise InputError(f"running statistics must be finite to be pooled; got others from rank {rank}, of {held.name}")


@torch.no_grad()
def _commit(held: _Held, ranks: BatchMoments) -> None:
    if bool((torch.as_tensor(ranks.count) > 0).any()):
        pooled = reference.pooled(ranks)
        held.mean.copy_(pooled.mean)
        held.var.copy_(pooled.var)
    _POOLED.setdefault(held.layer, {})[held.suffix] = held.batches
    if held.samples is not None:
        held.samples.zero_()
