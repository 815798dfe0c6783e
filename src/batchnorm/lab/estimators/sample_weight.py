"""Batch normalization in which a row counts as often as its sample weight says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import ops
from batchnorm.kernels.records import BatchMoments
from batchnorm.nn import BatchNorm1d
from batchnorm.nn.buffers import context_of
from batchnorm.nn.step import decide_in_torch

__all__ = ["SampleWeightedBatchNorm1d", "weighted_rows"]


class SampleWeightedBatchNorm1d(BatchNorm1d):
    """`BatchNorm1d` over (N, C) whose batch statistics are weighted while `weighted_rows` gives it weights.

    ``mean = sum w_i z_i / sum w_i`` and ``var = sum w_i (z_i - mean)^2 / sum w_i``: a row of weight 2 is two rows
    in y, in the gradient and in the running statistics.
    """

    sample_weight: Tensor | None = None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002 (torch's name for it)
        """Return y of input's shape (N, C), as `BatchNorm1d` unless there are weights."""
        if self.sample_weight is None or not self.trains():
            return super().forward(input, *args, **kwargs)
        total = self.sample_weight.sum()
        share = self.sample_weight / total
        mean = share @ input
        rest = share @ (input - mean)  # one float can't hold a mean that is far above the standard deviation
        centered = input - mean - rest
        var = share @ centered.square()
        # Weights whose sum is below the number of rows do not count rows, and could not correct the bias.
        count = total.clamp(min=len(input))
        unbiased_var = var * (count / (count - 1).clamp(min=1))
        self._update_running(BatchMoments(mean + rest, unbiased_var, count))
        return torch.addcmul(self.bias, centered * torch.rsqrt(var + self.eps), self.weight)

    @torch.no_grad()
    def _update_running(self, batch: BatchMoments) -> None:
        """Update the running statistics by the library's rule, which skips a batch that is not finite.

        They are averaged with `torch.lerp`, and the rule (momentum 1) puts the result in their place: its own average
        rounds differently, and a fit shall give the same numbers in every version.
        """
        running = decide_in_torch(self, context_of(self)).running
        assert running.mean is not None
        assert running.var is not None
        assert running.momentum is not None
        mean, var = running.mean.lerp(batch.mean, running.momentum), running.var.lerp(batch.var, running.momentum)
        replacing = running._replace(momentum=1.0, unbiased=False)
        ops.running.update_(replacing, BatchMoments(mean, var, batch.count))


@contextmanager
def weighted_rows(network: nn.Module, weight: Tensor | None) -> Iterator[None]:
    """Give every `SampleWeightedBatchNorm1d` of the network the weights (N,) of the next mini-batch."""
    layers = [layer for layer in network.modules() if isinstance(layer, SampleWeightedBatchNorm1d)]
    try:
        for layer in layers:
            layer.sample_weight = weight
        yield
    finally:
        for layer in layers:
            layer.sample_weight = None
