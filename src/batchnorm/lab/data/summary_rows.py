"""Rows that sum up the others, such as a line of totals at the end of a spreadsheet."""

from __future__ import annotations

import polars as pl

from batchnorm.lab.data.findings import Cell, Finding
from batchnorm.lab.data.places import Places, shown

__all__ = ["without_summary_rows"]

COUNT = r"\s*(?:\([^()]*\))?\s*:?\s*$"
PARTIAL = rf"(?i)^\s*(?:grand|sub)[ -]?totals?{COUNT}"
"""Names of sums that are no categories, wherever they are."""

SUMMARY = rf"(?i)^\s*(?:(?:(?:grand|sub|overall)[ -]?)?total|sum|average|mean|summe|gesamt)s?{COUNT}"
NUMBER_LIKE = r"^[^\p{L}]*\d[^\p{L}]*$"


def without_summary_rows(frame: pl.DataFrame, places: Places) -> tuple[pl.DataFrame, Places, list[Finding]]:
    """Return a table without its rows that begin with a word such as "Total", their places, and a finding.

    Such a row is one of the last ones, stands in a column whose other cells are numbers, or begins with "Subtotal" or
    "Grand total". Where another word occurs in further rows of a column of texts it is a category. Rows with one cell
    at the end, below such a row, are left out with it: they are remarks.
    """
    rows: dict[int, tuple[str, str]] = {}
    for column in frame.iter_columns():
        if column.dtype != pl.String:
            continue
        named = column.str.contains(SUMMARY).fill_null(False)
        found = [row for row in named.arg_true() if _first_cell(frame, row) == column.name]
        if not found:
            continue
        partial = column.str.contains(PARTIAL).fill_null(False)
        last = _last_rows(frame, found)
        if not (_is_numeric(column, named) or all(row in last or partial[row] for row in named.arg_true())):
            found, last = [row for row in found if partial[row]], {}
        rows |= {row: (column.name, column[row]) for row in found} | last
    if not rows or len(rows) == frame.height:
        return frame, places, []
    first = min(rows)
    name, text = rows[first]
    cells = [Cell(text, places.name(row), 1) for row, (_, text) in sorted(rows.items())]
    more = f", and so {'is' if len(rows) == 2 else 'are'} {len(rows) - 1} more" if len(rows) > 1 else ""
    note = f"{places.name(first)} begins with {shown(text.strip())} and is left out, as it sums up other rows{more}"
    if len(rows) > 1:
        note += f" (last: {places.name(max(rows))})"
    kept = [row not in rows for row in range(frame.height)]
    return frame.filter(pl.Series(kept)), places.without(rows), [Finding(name, "rows", cells, note)]


def _first_cell(frame: pl.DataFrame, row: int) -> str:
    """Return the column of the first filled cell of a row; an empty text where there is none."""
    return next((name for name, value in zip(frame.columns, frame.row(row), strict=True) if _is_filled(value)), "")


def _is_filled(value: object) -> bool:
    return value is not None and bool(str(value).strip())


def _last_rows(frame: pl.DataFrame, found: list[int]) -> dict[int, tuple[str, str]]:
    """Return the column and text of the first cell of the last rows: found ones, and rows with one cell below them."""
    rows: dict[int, tuple[str, str]] = {}
    for row in reversed(range(min(found), frame.height)):
        filled = [(name, str(v)) for name, v in zip(frame.columns, frame.row(row), strict=True) if _is_filled(v)]
        if row not in found and (len(filled) != 1 or frame.width == 1):
            break
        rows[row] = filled[0]
    highest = min((row for row in found if row in rows), default=frame.height)
    return {row: cell for row, cell in rows.items() if row >= highest}


def _is_numeric(column: pl.Series, named: pl.Series) -> bool:
    others = column.filter(~named).str.strip_chars().drop_nulls()
    return others.len() > 0 and 10 * others.str.contains(NUMBER_LIKE).sum() >= 9 * others.len()
