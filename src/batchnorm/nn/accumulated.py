"""The micro-batches that a layer has seen, as if they were one batch."""

from __future__ import annotations

import torch

from batchnorm import ops
from batchnorm.kernels import reference
from batchnorm.kernels.records import BatchMoments, Running

__all__ = ["Pool", "add", "commit"]

Pool = dict[str | None, list[BatchMoments]]  # of each domain


def add(pool: Pool, domain: str | None, batch: BatchMoments, running: Running) -> None:
    """Remember a micro-batch; under a transform, with which its numbers end, it is left out.

    Raises
    ------
    InputError
        Under vmap, where it would be many.
    """
    if not ops.running.may_write(None):
        return
    seen = pool.setdefault(domain, [])
    if torch.compiler.is_compiling():  # a graph holds for a list of one length alone
        seen[:] = [_together([*seen, batch], running)]
    else:
        seen.append(batch)


def commit(seen: list[BatchMoments], running: Running) -> None:
    """Move running statistics once, by the moments of all micro-batches."""
    ops.running.update_(running, _together(seen, running))


def _together(parts: list[BatchMoments], running: Running) -> BatchMoments:
    """The moments of all parts; those that are not finite are counted as skipped, and left out.

    Where none is finite, the whole is not, and the last of them is not counted, since moving by the whole does it.
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
