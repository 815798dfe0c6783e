"""The moments of micro-batches that are pooled to update running statistics once."""

from __future__ import annotations

import torch

from batchnorm import ops
from batchnorm.kernels import reference
from batchnorm.kernels.records import BatchMoments, Running

__all__ = ["Pool", "add", "commit"]

Pool = dict[str | None, list[BatchMoments]]
"""The moments of the micro-batches seen so far, by domain."""


def add(pool: Pool, domain: str | None, batch: BatchMoments, running: Running) -> None:
    """Add a micro-batch to the pool, unless a transform is active, since its numbers would outlive the transform.

    Raises
    ------
    InputError
        vmap is active, under which the micro-batch stands for many.
    """
    if not ops.running.may_write(None, batch.mean):
        return
    parts = pool.setdefault(domain, [])
    if torch.compiler.is_compiling():  # a graph is valid for one length of the list only
        parts[:] = [_merged([*parts, batch], running)]
    else:
        parts.append(batch)


def commit(parts: list[BatchMoments], running: Running) -> None:
    """Update running statistics once, by the moments of all micro-batches."""
    ops.running.update_(running, _merged(parts, running))


def _merged(parts: list[BatchMoments], running: Running) -> BatchMoments:
    """Return the moments of all parts; parts that are not finite are left out, and counted as skipped.

    If no part is finite, neither is the result, and one part less is counted, since the update by the result counts it.
    """
    each = reference.stacked(parts)
    if running.skipped is None:
        return reference.pooled(each)
    assert running.mean is not None
    assert running.var is not None
    mean, var = each.mean.to(running.mean.dtype), each.var.to(running.var.dtype)
    finite = mean.isfinite().all(1) & var.isfinite().all(1)
    whole = reference.pooled(each._replace(count=torch.where(finite, each.count, 0)))
    none = ~finite.any()
    running.skipped.add_((~finite).sum() - none.long())
    return whole._replace(mean=torch.where(none, torch.nan, whole.mean))
