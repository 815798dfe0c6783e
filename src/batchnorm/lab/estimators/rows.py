"""The rows of a fit, and mini-batches of them as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.model_selection import train_test_split
from torch import Tensor

from batchnorm.errors import InputError

__all__ = ["FitRows", "dense"]


@dataclass(frozen=True)
class FitRows:
    """Rows of a fit.

    Attributes
    ----------
    X : array or csr matrix, shape (N, features)
    y : array
        Targets as they were given.
    target : ndarray, shape (N, outputs)
        Targets as the numbers that the network is fitted to.
    weight : ndarray, shape (N,), or None
        Sample weights.
    """

    X: Any
    y: Any
    target: NDArray[Any]
    weight: NDArray[Any] | None

    def __len__(self) -> int:
        return len(self.target)

    def take(self, index: NDArray[Any]) -> FitRows:
        """Copy the rows that an index, or a mask, selects."""
        weight = None if self.weight is None else self.weight[index]
        return FitRows(self.X[index], self.y[index], self.target[index], weight)

    def batch(self, index: NDArray[Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Copy a mini-batch: features, targets as numbers, and weights or None."""
        weight = None if self.weight is None else torch.from_numpy(self.weight[index])
        return dense(self.X[index]), torch.from_numpy(self.target[index]), weight

    def split(self, fraction: float, random_state: np.random.RandomState, *, stratify: bool) -> tuple[FitRows, FitRows]:
        """Split off a fraction of the rows as holdout; with ``stratify`` each class in proportion.

        Raises
        ------
        InputError
            The holdout would have fewer than 2 rows.
        """
        fitted, holdout = train_test_split(
            np.arange(len(self)),
            random_state=random_state,
            test_size=fraction,
            stratify=self.target if stratify and self.target.shape[1] == 1 else None,
        )
        if len(holdout) < 2:
            raise InputError(
                f"early_stopping needs a holdout of at least 2 rows; got {len(holdout)}: give more rows, or a greater "
                "validation_fraction"
            )
        return self.take(fitted), self.take(holdout)


def dense(X: Any) -> Tensor:
    """Return a writable array or a sparse matrix as a dense tensor."""
    return torch.from_numpy(X.toarray() if issparse(X) else X)
