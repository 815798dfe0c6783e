"""The rows of a fit, and mini-batches of them as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from torch import Tensor

__all__ = ["Rows", "dense"]


@dataclass(frozen=True)
class Rows:
    """Features (dense or csr), targets as they were given and as numbers (N, outputs), and sample weights or None."""

    X: Any
    y: Any
    target: NDArray[Any]
    weight: NDArray[Any] | None

    def __len__(self) -> int:
        return len(self.target)

    def take(self, index: NDArray[Any]) -> Rows:
        """Copy the rows that the index, or a mask, selects."""
        weight = None if self.weight is None else self.weight[index]
        return Rows(self.X[index], self.y[index], self.target[index], weight)

    def batch(self, index: NDArray[Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Copy a mini-batch: features, targets as numbers, weights or None."""
        weight = None if self.weight is None else torch.from_numpy(self.weight[index])
        return dense(self.X[index]), torch.from_numpy(self.target[index]), weight


def dense(X: Any) -> Tensor:
    """A writable array or a sparse matrix as a dense tensor."""
    return torch.from_numpy(X.toarray() if issparse(X) else X)
