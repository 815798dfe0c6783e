"""Distances between two normal distributions, channel by channel."""

from __future__ import annotations

from torch import Tensor

__all__ = ["symmetrised_kl", "wasserstein"]


def symmetrised_kl(mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor) -> Tensor:
    """The sum of both Kullback-Leibler divergences of N(mean, var) and N(other_mean, other_var), halved, in nats (C,).

    >>> import torch
    >>> symmetrised_kl(*(torch.tensor([x]) for x in (0.0, 1.0, 1.0, 1.0)))
    tensor([0.5000])
    """
    away = (mean - other_mean) ** 2
    return ((var + away) / other_var + (other_var + away) / var) / 4 - 0.5


def wasserstein(mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor) -> Tensor:
    """The 2-Wasserstein distance of N(mean, var) and N(other_mean, other_var), in units of x (C,).

    >>> import torch
    >>> wasserstein(*(torch.tensor([x]) for x in (0.0, 1.0, 3.0, 25.0)))
    tensor([5.])
    """
    return ((mean - other_mean) ** 2 + (var.sqrt() - other_var.sqrt()) ** 2).sqrt()
