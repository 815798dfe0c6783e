"""Columns of a table: their values as numbers, and the reasons why one cannot be a feature."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from batchnorm.errors import DataError

__all__ = ["LeftOut", "as_numbers", "has_scalars", "is_categorical", "reason_to_leave_out", "running_index"]


@dataclass(frozen=True)
class LeftOut:
    """A column that is not used, and the reason."""

    column: str
    reason: str


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


def is_categorical(column: pl.Series) -> bool:
    """Return whether a column holds texts, truth values or categories."""
    return not (column.dtype.is_numeric() or column.dtype.is_temporal())


def reason_to_leave_out(column: pl.Series, as_category: bool) -> str | None:
    """Return the reason why a column has nothing to learn from; None where it has."""
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
