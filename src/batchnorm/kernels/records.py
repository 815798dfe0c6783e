"""Records that travel with a batch: its operands, the running statistics, the rule, moments and gradients.

Every way of computing batch normalization (`reference`, `native`, the operators) takes these; only the schemas of the
operators spell them out as flat lists of tensors. Tensors are (N, C, *); "(C,)" means one value per channel.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from torch import Tensor

__all__ = ["BatchMoments", "Gradients", "Limits", "MomentsBuffer", "Operands", "Rule", "Running"]

MomentsBuffer = ctypes.Array[ctypes.c_double]
"""The moments of a planned call, one row after the other; a tensor would take ten times as long to make."""


class Operands(NamedTuple):
    """The tensors of ``y = activation(weight * x_hat + bias + residual)``.

    Attributes
    ----------
    x : Tensor, shape (N, C, *)
    weight, bias : Tensor or None, shape (C,)
        gamma and beta; None stands for 1 and 0.
    residual : Tensor or None, shape (N, C, *)
        Added before the activation.
    mask : Tensor or None, shape (N, *), bool
        True where a value counts; each size is equal or 1.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    mask: Tensor | None = None


class Running(NamedTuple):
    """Running statistics, and how a training batch updates them.

    Attributes
    ----------
    mean, var : Tensor or None, shape (C,)
    batches : Tensor or None
        Count of batches, a scalar of int64.
    momentum : float or None
        Weight of the new value; None is the cumulative mean: one over the count of batches, this one included.
    skipped : Tensor or None
        Count of batches left out because a mean or variance was not finite, a scalar of int64. Where it is None such a
        batch updates the statistics.
    unbiased : bool
        Keep the unbiased variance, as torch does, or the biased one, as Keras and Flax do.
    update : bool
        Whether a training batch updates the statistics; otherwise they are only read.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    batches: Tensor | None = None
    momentum: float | None = 0.0
    skipped: Tensor | None = None
    unbiased: bool = True
    update: bool = True


class Limits(NamedTuple):
    """Limits of batch renormalization: 1 / r_max <= r <= r_max and -d_max <= d <= d_max."""

    r_max: float
    d_max: float


class Rule(NamedTuple):
    """How a batch is normalized.

    Attributes
    ----------
    eps : float
        Added to the variance.
    activation : str or None
    training : bool
        Normalize with the statistics of the batch; otherwise with the running ones.
    chunks, chunk : int
        Number of virtual batches and samples per virtual batch; the last one takes the samples that are left.
    limits : Limits or None
        Batch renormalization computes r and d from the running statistics, within these limits.
    correction : Tensor or None, shape (2, chunks, C)
        The r and d of batch renormalization, where they are known already.
    """

    eps: float
    activation: str | None
    training: bool
    chunks: int = 1
    chunk: int = 0
    limits: Limits | None = None
    correction: Tensor | None = None


class BatchMoments(NamedTuple):
    """Mean and biased variance (C,) that normalize a batch, and the number of values per channel."""

    mean: Tensor
    var: Tensor
    count: Tensor | int  # type: ignore[assignment]  # it replaces tuple.count


class Gradients(NamedTuple):
    """Gradients of the operands; None for those that are not wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
