"""Batch normalization in which a row counts as often as its sample weight says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.nn import BatchNorm1d

__all__ = ["SampleWeightedBatchNorm1d", "weighted_rows"]


class SampleWeightedBatchNorm1d(BatchNorm1d):
    """`BatchNorm1d` over (N, C) whose batch statistics are weighted while `weighted_rows` gives it weights.

    ``mean = sum w_i z_i / sum w_i`` and ``var = sum w_i (z_i - mean)^2 / sum w_i``: a row of weight 2 is two rows
    in y, in the gradient and in the running statistics.
    """

    sample_weight: Tensor | None = None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002 (torch's name for it)
        """Return y of input's shape (N, C), as `BatchNorm1d` unless there are weights."""
        if self.sample_weight is None or not self.training:
            return super().forward(input, *args, **kwargs)
        total = self.sample_weight.sum()
        share = self.sample_weight / total
        mean = share @ input
        rest = share @ (input - mean)  # of the mean, which one float can't hold where it is far above the deviation
        centred = input - mean - rest
        var = share @ centred.square()
        # Weights that sum to less than the rows do not count them, and could not correct the variance's bias.
        count = total.clamp(min=len(input))
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]  # there are running statistics
            self.running_mean.lerp_(mean + rest, self.momentum)  # type: ignore[union-attr, arg-type]
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)  # type: ignore[union-attr, arg-type]
        return torch.addcmul(self.bias, centred * torch.rsqrt(var + self.eps), self.weight)


@contextmanager
def weighted_rows(network: nn.Module, weight: Tensor | None) -> Iterator[None]:
    """Give every `SampleWeightedBatchNorm1d` of the network the weights (N,) of the mini-batch to come."""
    layers = [layer for layer in network.modules() if isinstance(layer, SampleWeightedBatchNorm1d)]
    try:
        for layer in layers:
            layer.sample_weight = weight
        yield
    finally:
        for layer in layers:
            layer.sample_weight = None
