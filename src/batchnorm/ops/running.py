"""How a batch updates running statistics: the one rule, in torch operations."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from batchnorm import torch_internals
from batchnorm.errors import InputError, warn
from batchnorm.kernels.records import BatchMoments, Running
from batchnorm.kernels.reference import at_least_one, statistics_dtype

__all__ = ["may_write", "update_", "updated"]


def update_(running: Running, batch: BatchMoments) -> None:
    """Update running statistics in place by a batch's moments (C,), as the native kernels do.

    A batch with at most one value per channel changes nothing but the count of batches. Where ``running.skipped`` is
    given, a batch with a channel whose mean or variance is not finite leaves the statistics and the count of batches
    unchanged, and adds one to ``running.skipped``.
    """
    if torch_internals.is_exporting():  # torch cannot save a program with a block of torch.no_grad that returns nothing
        _update(running, batch._replace(mean=batch.mean.detach(), var=batch.var.detach()))
    else:
        with torch.no_grad():
            _update(running, batch)


def _update(running: Running, batch: BatchMoments) -> None:
    mean, var, batches, momentum, skipped, unbiased, update = running
    pairs = [
        (old, new) for old, new in ((mean, batch.mean), (var, _variance_to_keep(batch, unbiased))) if old is not None
    ]
    statistics = batches if mean is None else mean
    if not update or statistics is None or not may_write(statistics, batch.mean):
        return
    finite: Tensor | None = None
    if skipped is not None and pairs:
        finite = torch.stack([new.to(old.dtype).isfinite().all() for old, new in pairs]).all()
        _count(skipped, ~finite)
    if batches is not None:
        batches = _count(batches, 1 if finite is None else finite)
    share = _share(momentum, batches)
    counts = _has_enough_values(batch) if finite is None else finite & _has_enough_values(batch)
    for old, new in pairs:
        old.copy_(torch.where(counts, _weighted(old, new, share), old))


def updated(running: Running, batch: BatchMoments) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and count of batches as `update_` would leave them, without a gradient."""
    mean, var, batches, momentum, _, unbiased, _ = running
    assert mean is not None
    assert var is not None
    assert batches is not None
    batches = batches + 1
    share, counts = _share(momentum, batches), _has_enough_values(batch)
    pairs = ((mean.detach(), batch.mean.detach()), (var.detach(), _variance_to_keep(batch, unbiased).detach()))
    new_mean, new_var = (torch.where(counts, _weighted(old, new, share), old) for old, new in pairs)
    return new_mean, new_var, batches


def _count(count: Tensor, number: Tensor | int) -> Tensor:
    """Add a number to a count, and return the sum; a count that is not passed in to a transform stays as it is."""
    if _obstacle(count, number if isinstance(number, Tensor) else count) is None:
        return count.add_(number)
    return count + number


def _has_enough_values(batch: BatchMoments) -> Tensor:
    """Return whether a batch has the two values per channel without which it updates no running statistics."""
    count = batch.count
    return (count if isinstance(count, Tensor) else torch.full((), count, device=batch.mean.device)) > 1


def _share(momentum: float | None, batches: Tensor | None) -> Tensor | float:
    """Return the weight of the batch in the running statistics; ``batches`` includes it already."""
    if momentum is not None:
        return momentum
    # In float64, because a quotient of whole numbers would be a float32.
    return 1.0 if batches is None else 1.0 / batches.to(statistics_dtype(batches))


def _weighted(old: Tensor, new: Tensor, share: Tensor | float) -> Tensor:
    """Return the weighted mean as torch computes it; lerp gives NaN for an infinite value where the share is >= 0.5."""
    share = share.to(old.dtype) if isinstance(share, Tensor) else share
    return share * new.to(old.dtype) + (1 - share) * old


def _variance_to_keep(batch: BatchMoments, unbiased: bool) -> Tensor:
    """Return the batch's variance in the kind that the running statistics keep."""
    count = batch.count.to(batch.var.dtype) if isinstance(batch.count, Tensor) else batch.count
    return batch.var * (count / at_least_one(count - 1)) if unbiased else batch.var


def may_write(values: Tensor | None, new: Tensor | None) -> bool:
    """Return whether a batch's numbers may be written to the values: under a transform only to those passed in to it.

    None stands for values that outlive the transform, and for numbers that depend on all its arguments.

    Raises
    ------
    InputError
        vmap maps over the batch and not over the values, which each sample would update.
    """
    obstacle = _obstacle(values, new)
    if obstacle == "unmapped":
        raise InputError(
            "under vmap a training batch can't update running statistics that are not mapped over too; pass them in "
            "with torch.func.functional_call, or use batchnorm.normalize, which returns them"
        )
    if obstacle == "captured":
        _warn_of_captured()
    return obstacle is None


def _obstacle(values: Tensor | None, new: Tensor | None) -> str | None:
    if torch.compiler.is_compiling() or not torch_internals.is_transformed():
        return None
    return torch_internals.obstacle_to_update(values, new)


@functools.cache
def _warn_of_captured() -> None:
    warn(
        "under torch.func.grad, jvp or functionalize, running statistics that are no argument of the transformed "
        "function are not updated; batchnorm.normalize returns updated ones"
    )
