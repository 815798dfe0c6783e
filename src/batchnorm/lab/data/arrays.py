"""Tables from the arrays and data frames of Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from batchnorm.errors import DataError
from batchnorm.lab.data.frames import read_cells
from batchnorm.lab.data.names import suggestion, unique_names
from batchnorm.lab.data.reading import Reading
from batchnorm.lab.data.tables import AS_IT_STANDS, Table

__all__ = ["table_from_arrays"]


def table_from_arrays(X: Any, y: Any, name: str, reading: Reading = AS_IT_STANDS) -> Table:
    """Return features and target as one table, whose texts are read as those of a file are.

    Parameters
    ----------
    X : array or data frame, shape (rows, columns)
        The columns of an array are called x1, x2, ...
    y : array, shape (rows,), or str
        The target, or the name of the column of X that is the target.
    name : str
        Name of the data.
    reading : Reading
        Decisions that the table itself leaves open.

    Raises
    ------
    DataError
        X or y has the wrong shape, or a column has the name of the target.
    """
    frame, notes = _frame(X)
    target = y if isinstance(y, str) else str(getattr(y, "name", None) or "y")
    if isinstance(y, str):
        if y not in frame.columns:
            close = suggestion(y, frame.columns)
            raise DataError(f"y must be the name of a column of X, or one value per row; X has no column {y!r}{close}")
    else:
        values = np.asarray(y)
        if values.ndim != 1:
            raise DataError(f"y must have 1 dimension; got {values.ndim}")
        if len(values) != frame.height:
            raise DataError(f"y must have one value for each of the {frame.height} rows of X; got {len(values)}")
        if target in frame.columns:
            raise DataError(f"y must not have the name of a column of X; both are named {target!r}")
        frame = frame.with_columns(_series(target, values))
    return Table.of(name, read_cells(frame, reading, notes=notes), target)


def _frame(X: Any) -> tuple[pl.DataFrame, list[str]]:
    """Return the features as a Polars data frame, and notes on names that were changed."""
    if isinstance(X, pl.DataFrame):
        objects = [column for column in X.iter_columns() if column.dtype == pl.Object]
        return X.with_columns(_series(column.name, column.to_numpy()) for column in objects), []
    if hasattr(X, "columns"):  # pandas, or another library with the same interface
        names, notes = unique_names([str(name) for name in X.columns])
        columns = [X.iloc[:, i] if hasattr(X, "iloc") else X[name] for i, name in enumerate(X.columns)]
        return pl.DataFrame([_series(name, np.asarray(c)) for name, c in zip(names, columns, strict=True)]), notes
    array = np.asarray(X)
    if array.ndim != 2:
        raise DataError(f"X must have 2 dimensions, rows and columns; got {array.ndim}")
    return pl.DataFrame([_series(f"x{i}", column) for i, column in enumerate(array.T, 1)]), []


def _series(name: str, values: np.ndarray[Any, Any]) -> pl.Series:
    """Return a column; one that mixes texts with other values becomes one of texts."""
    if values.dtype.kind == "M":
        return pl.Series(name, values.astype("datetime64[us]"))
    if values.dtype.kind not in "OSU":
        return pl.Series(name, values.tolist(), strict=False)
    cells = [None if _is_missing(value) else value for value in values.tolist()]
    if any(isinstance(value, str | bytes) for value in cells):
        return pl.Series(name, [_text(value) for value in cells], dtype=pl.String)
    return pl.Series(name, cells, strict=False)


def _is_missing(value: Any) -> bool:
    """Return whether an object is None, NaN, or the missing value of pandas."""
    try:
        return value is None or bool(value != value)
    except (TypeError, ValueError):  # pandas.NA has no truth value
        return type(value).__name__ == "NAType"


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
