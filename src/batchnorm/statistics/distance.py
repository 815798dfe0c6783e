"""Distances between two normal distributions, channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["symmetrized_kl", "wasserstein"]


def symmetrized_kl(mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor) -> Tensor:
    """Return the symmetrized Kullback-Leibler divergence of two normal distributions p and q, in nats.

    This is the sum of both directions, KL(p || q) + KL(q || p), not their mean (Jeffreys 1946; Kullback & Leibler
    1951). The package calls it drift wherever it shows it. Distributions without variance are at distance 0 if they
    agree, and at an infinite distance otherwise.

    >>> symmetrized_kl(*(torch.tensor([x]) for x in (0.0, 1.0, 1.0, 1.0)))
    tensor([1.])
    """
    squared_deviation = (other_mean - mean) ** 2
    ratio = (var + squared_deviation) / other_var + (other_var + squared_deviation) / var
    same = (squared_deviation == 0) & (var == other_var)
    return torch.where(same, 0.0, ratio / 2 - 1)


def wasserstein(mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor) -> Tensor:
    """Return the 2-Wasserstein distance of N(mean, var) and N(other_mean, other_var), in units of x.

    >>> wasserstein(*(torch.tensor([x]) for x in (0.0, 1.0, 3.0, 25.0)))
    tensor([5.])
    """
    return ((mean - other_mean) ** 2 + (var.sqrt() - other_var.sqrt()) ** 2).sqrt()
