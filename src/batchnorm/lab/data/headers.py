"""Headers: whether the first line of a text file has the names of the columns."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from batchnorm.lab.data.date_texts import parse_dates
from batchnorm.lab.data.missing import is_placeholder, stripped, without_missing
from batchnorm.lab.data.number_texts import parse_numbers

__all__ = ["looks_like_row"]


def looks_like_row(header: Sequence[str], frame: pl.DataFrame, *, repeated: bool = False) -> bool:
    """Return whether a header could be a row of the table below it.

    Each of its cells fits its column: a number or a missing value where numbers are, a date where dates are. In a table
    of texts alone half of its cells occur in their column again. Numbers that count, and years above other numbers, are
    names.

    Parameters
    ----------
    header : sequence of str
    frame : DataFrame
        The rows below it, whose numbers and dates were read.
    repeated : bool
        Whether rows that are equal to the header were left out.
    """
    cells = stripped(pl.Series(header, dtype=pl.String))
    if frame.height == 0 or _are_counted(cells, frame):
        return False
    known = without_missing(cells, ())
    placeholder = known.is_null() | is_placeholder(known).fill_null(False)
    numbers, _ = parse_numbers(known, comma=False)
    dates = parse_dates(known, "day-first").is_not_null() | parse_dates(known, "month-first").is_not_null()
    fits = texts = again = 0
    for i, column in enumerate(frame.iter_columns()):
        if column.dtype == pl.String:
            texts += 1
            again += known[i] is not None and known[i] in column
        elif column.dtype.is_numeric():
            if numbers[i] is None and not placeholder[i]:
                return False
            fits += numbers[i] is not None
        elif column.dtype in (pl.Date, pl.Datetime):
            if not dates[i] and not placeholder[i]:
                return False
            fits += bool(dates[i])
        elif column.dtype == pl.Boolean:
            if str(known[i]).lower() not in ("true", "false"):
                return False
            fits += 1
        else:
            return False
    return fits > 0 or (texts > 1 and (repeated or 2 * again >= texts))


def _are_counted(cells: pl.Series, frame: pl.DataFrame) -> bool:
    """Return whether the numbers of a header count from 0 or 1, as names of columns do, or are years above others."""
    numbers = cells.cast(pl.Int64, strict=False)
    known = numbers.drop_nulls()
    steps = known.diff().drop_nulls()
    if known.len() > 1 and bool((steps == 1).all()) and known[0] in (0, 1):
        return True
    below = [column for column, year in zip(frame.iter_columns(), numbers, strict=True) if year is not None]
    if known.len() == 0 or known.is_duplicated().any() or not _are_years(known):
        return False
    return not any(_are_years(column) for column in below)


def _are_years(numbers: pl.Series) -> bool:
    return numbers.dtype.is_integer() and bool(numbers.is_between(1800, 2100).all())
