"""Columns of a table turned into features: numbers as they are, categories as one-hot columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray

from batchnorm.errors import DataError

__all__ = ["Features", "LeftOut", "as_numbers", "encode_columns", "has_scalars", "running_index"]

MAX_CATEGORIES = 20


@dataclass(frozen=True)
class LeftOut:
    """A column that is not used, and the reason."""

    column: str
    reason: str


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
        as_category = column.name in categorical or (_is_categorical(column) and column.name not in numeric)
        values = column
        if not as_category and (column.dtype.is_float() or forced):
            values = as_numbers(column)
        reason = _reason_to_leave_out(values, as_category)
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


def has_scalars(column: pl.Series) -> bool:
    """Return whether a column holds numbers, texts, categories, booleans or dates, and no lists or objects."""
    return not (column.dtype.is_nested() or column.dtype in (pl.Object, pl.Binary))


def as_numbers(column: pl.Series) -> pl.Series:
    """Return a column as float64; values that are not finite become missing ones.

    Raises
    ------
    DataError
        A text is no number.
    """
    if column.dtype.is_temporal():
        column = column.to_physical()
    try:
        numbers = column.cast(pl.Float64)
    except pl.exceptions.InvalidOperationError as error:
        text = next(value for value in column.drop_nulls() if not _is_number(value))
        raise DataError(f"column {column.name!r} must hold numbers; it holds {text!r}") from error
    return numbers.to_frame().select(pl.when(pl.all().is_finite()).then(pl.all())).to_series()


def running_index(values: pl.Series) -> bool:
    """Return whether whole numbers go up by 1 from row to row, as an index does."""
    if not values.dtype.is_integer() or values.null_count() or values.len() < 2:
        return False
    return bool((values.diff().drop_nulls() == 1).all())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_categorical(column: pl.Series) -> bool:
    return not (column.dtype.is_numeric() or column.dtype.is_temporal())


def _reason_to_leave_out(column: pl.Series, as_category: bool) -> str | None:
    known = column.drop_nulls()
    if known.len() == 0:
        return "it has no values"
    if known.n_unique() == 1:
        return "it has one value" if known.len() == column.len() else None
    if as_category and known.n_unique() == column.len():
        return _reason_for_different_texts(known)
    if not as_category and running_index(column):
        return "it counts the rows, as an index does"
    return None


def _reason_for_different_texts(texts: pl.Series) -> str:
    """Tell texts that look like identifiers from numbers with a few other texts among them."""
    texts = texts.cast(pl.String)
    odd = texts.filter(texts.str.strip_chars().cast(pl.Float64, strict=False).is_null())
    if 2 * odd.len() >= texts.len() or not odd.len():
        return "all its texts differ, as identifiers do"
    return f"its texts differ and are not all numbers, such as {odd[0]!r}"


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
