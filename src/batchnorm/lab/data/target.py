"""The column to predict, turned into class numbers or into numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import polars as pl
from numpy.typing import NDArray

from batchnorm.errors import DataError
from batchnorm.lab.data.columns import as_numbers, has_scalars

__all__ = ["MAX_NUMERIC_CLASSES", "Target", "Task", "encode_target"]

Task = Literal["classification", "regression"]

MAX_NUMERIC_CLASSES = 20


@dataclass(frozen=True)
class Target:
    """Values to predict.

    Attributes
    ----------
    task : "classification" or "regression"
    y : ndarray, shape (N,)
        Class numbers, or numbers.
    classes : list of str
        Names of the classes; empty for a regression.
    note : str
        Sentence that says why it is this task.
    """

    task: Task
    y: NDArray[Any]
    classes: list[str]
    note: str


def encode_target(column: pl.Series, task: Task | None) -> Target:
    """Turn a column without missing values into a target; without a task, infer it.

    Raises
    ------
    DataError
        The column can't be a target; the message says which rule it breaks.
    """
    if not has_scalars(column):
        raise DataError(f"a target must hold numbers, texts or dates; {column.name!r} holds {column.dtype}")
    numeric = column.dtype.is_numeric()
    whole = numeric and bool((column == column.cast(pl.Float64).round()).all())
    few = column.n_unique() <= MAX_NUMERIC_CLASSES
    chosen: Task = task or ("classification" if not numeric or (whole and few) else "regression")
    if chosen == "regression":
        y = as_numbers(column)
        if y.null_count():
            raise DataError(f"a regression target must be finite; {column.name!r} is not in {y.null_count()} rows")
        why = "as requested" if task else f"{column.name} is a number with {column.n_unique()} values"
        return Target(chosen, y.to_numpy(), [], f"regression: {why}")
    values = _classes(column)
    y = column.replace_strict(values, pl.Series(range(values.len())), return_dtype=pl.Int64)
    why = "as requested" if task else f"{column.name} has {values.len()} {'values' if numeric else 'categories'}"
    return Target(chosen, y.to_numpy(), [str(value) for value in values], f"classification: {why}")


def _classes(column: pl.Series) -> pl.Series:
    """Return the classes in ascending order, once it is sure that each has a row to train and one to test on."""
    counts = column.value_counts().sort(column.name)
    if counts.height < 2:
        raise DataError(f"a target must have at least 2 classes; {column.name!r} has 1: {counts[0, 0]}")
    rare = counts.filter(pl.col("count") < 2)
    if rare.height:
        raise DataError(
            f"every class must have at least 2 rows; in {column.name!r} {rare[0, 0]} has 1"
            + (f", and so have {rare.height - 1} others" if rare.height > 1 else "")
        )
    return counts[column.name]
