"""Rows that sum up the others, such as a line of totals at the end of a spreadsheet."""

from __future__ import annotations

import polars as pl

from batchnorm.lab.data.findings import Cell, Finding
from batchnorm.lab.data.places import Places, shown

__all__ = ["without_summary_rows"]

SUMMARY = r"(?i)^\s*(?:grand[ -]?total|sub[ -]?total|total|sum|average|mean|summe|gesamt)s?\s*:?\s*$"
NUMBER_LIKE = r"^[^\p{L}]*\d[^\p{L}]*$"


def without_summary_rows(frame: pl.DataFrame, places: Places) -> tuple[pl.DataFrame, Places, list[Finding]]:
    """Return a table without its rows that begin with a word such as "Total", their places, and a finding.

    Such a row is the last one, or stands in a column whose other cells are numbers. Where the word occurs in further
    rows of a column of texts it is a category.
    """
    rows: dict[int, tuple[str, str]] = {}
    for column in frame.iter_columns():
        if column.dtype != pl.String:
            continue
        named = column.str.contains(SUMMARY).fill_null(False)
        found = [row for row in named.arg_true() if _is_first(frame, row, column.name)]
        if found and (found == [frame.height - 1] == list(named.arg_true()) or _is_numeric(column, named)):
            rows |= {row: (column.name, column[row]) for row in found}
    if not rows or len(rows) == frame.height:
        return frame, places, []
    first = min(rows)
    name, text = rows[first]
    cells = [Cell(text, places.name(row), 1) for row, (_, text) in sorted(rows.items())]
    more = f", and so {'is' if len(rows) == 2 else 'are'} {len(rows) - 1} more" if len(rows) > 1 else ""
    note = f"{places.name(first)} begins with {shown(text.strip())} and is left out, as it sums up other rows{more}"
    kept = [row not in rows for row in range(frame.height)]
    return frame.filter(pl.Series(kept)), places.without(rows), [Finding(name, "rows", cells, note)]


def _is_first(frame: pl.DataFrame, row: int, name: str) -> bool:
    """Return whether the first filled cell of a row is in this column."""
    for column in frame.iter_columns():
        if column.name == name:
            return True
        value = column[row]
        if value is not None and str(value).strip():
            return False
    return False


def _is_numeric(column: pl.Series, named: pl.Series) -> bool:
    others = column.filter(~named).str.strip_chars().drop_nulls()
    return others.len() > 0 and 10 * others.str.contains(NUMBER_LIKE).sum() >= 9 * others.len()
