"""Tables from the arrays and data frames of Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from batchnorm.errors import DataError
from batchnorm.lab.data.tables import Table

__all__ = ["table_from_arrays"]


def table_from_arrays(X: Any, y: Any, name: str) -> Table:
    """Return features and target as one table.

    Parameters
    ----------
    X : array or data frame, shape (rows, columns)
        The columns of an array are called x1, x2, ...
    y : array, shape (rows,), or str
        The target, or the name of the column of X that is the target.
    name : str
        Name of the data.

    Raises
    ------
    DataError
        X or y has the wrong shape, or a column has the name of the target.
    """
    frame = _frame(X)
    if isinstance(y, str):
        if y not in frame.columns:
            raise DataError(f"y must be the name of a column of X, or one value per row; X has no column {y!r}")
        return Table(name, frame, y)
    values = np.asarray(y)
    if values.ndim != 1:
        raise DataError(f"y must have 1 dimension; got {values.ndim}")
    if len(values) != frame.height:
        raise DataError(f"y must have one value for each of the {frame.height} rows of X; got {len(values)}")
    target = str(getattr(y, "name", None) or "y")
    if target in frame.columns:
        raise DataError(f"y must not have the name of a column of X; both are named {target!r}")
    return Table(name, frame.with_columns(pl.Series(target, values.tolist(), strict=False)), target)


def _frame(X: Any) -> pl.DataFrame:
    """Return the features as a Polars data frame."""
    if isinstance(X, pl.DataFrame):
        return X
    if hasattr(X, "columns"):  # pandas, or another library with the same interface
        return pl.DataFrame([pl.Series(str(name), np.asarray(X[name]).tolist(), strict=False) for name in X.columns])
    array = np.asarray(X)
    if array.ndim != 2:
        raise DataError(f"X must have 2 dimensions, rows and columns; got {array.ndim}")
    return pl.DataFrame([pl.Series(f"x{i}", column.tolist(), strict=False) for i, column in enumerate(array.T, 1)])
