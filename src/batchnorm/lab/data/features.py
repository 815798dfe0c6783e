"""Features made of the columns of a table: numbers as they are, categories as one-hot columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray

from batchnorm.lab.data.columns import LeftOut, as_numbers, has_scalars, is_categorical, reason_to_leave_out

__all__ = ["Features", "encode_columns"]

MAX_CATEGORIES = 20


@dataclass
class Features:
    """Features made of the columns of a table.

    Attributes
    ----------
    numbers : dict of str to ndarray, shape (N,)
        Columns of numbers, with missing values filled in.
    categories : dict of str to ndarray, shape (N,)
        One-hot columns.
    left_out : list of LeftOut
    notes : list of str
        Sentences about categories that were put together and values that were filled in.
    """

    numbers: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    categories: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def encode_columns(
    columns: Iterable[pl.Series], train: NDArray[np.int64], numeric: Sequence[str], categorical: Sequence[str]
) -> Features:
    """Turn columns into features.

    Parameters
    ----------
    columns : iterable of Series
    train : ndarray
        Numbers of the training rows, from which medians and categories are taken.
    numeric, categorical : sequences of str
        Names of columns to take as numbers or as categories, regardless of their values.
    """
    features = Features()
    filled = 0
    for column in columns:
        if not has_scalars(column):
            features.left_out.append(LeftOut(column.name, f"it holds {column.dtype}"))
            continue
        forced = column.name in numeric or column.name in categorical
        as_category = column.name in categorical or (is_categorical(column) and column.name not in numeric)
        values = column
        if not as_category and (column.dtype.is_float() or forced):
            values = as_numbers(column)
        reason = reason_to_leave_out(values, as_category)
        if reason is not None and not (forced and values.null_count() < values.len()):
            features.left_out.append(LeftOut(column.name, reason))
        elif as_category:
            _add_one_hot(features, column, train)
        else:
            values = as_numbers(values)
            filled += values.null_count()
            median = values[train].median()
            features.numbers[column.name] = values.fill_null(0.0 if median is None else median).to_numpy()
    if filled:
        features.notes.append(
            f"{filled} missing numbers are filled with the median of their column in the training rows"
        )
    return features


def _add_one_hot(features: Features, column: pl.Series, train: NDArray[np.int64]) -> None:
    """Add one column per category of the training rows, the rarest together; a missing value is a category too."""
    texts = column.cast(pl.String).fill_null("(missing)")
    ranked = texts[train].value_counts(sort=True).sort("count", texts.name, descending=[True, False])[texts.name]
    kept = ranked.head(MAX_CATEGORIES).sort().to_list()
    for category in kept:
        features.categories[f"{column.name}={category}"] = (texts == category).to_numpy().astype(np.float64)
    if ranked.len() > len(kept):
        features.categories[f"{column.name}=(other)"] = (~texts.is_in(kept)).to_numpy().astype(np.float64)
        features.notes.append(
            f"{column.name}: the {len(kept)} most frequent of {ranked.len()} categories have a column each"
        )
