"""Findings about the cells of a table that were not taken as they stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl

from batchnorm.lab.data.places import Places, shown

__all__ = ["Cell", "Finding", "Rule", "are", "cells_of", "describe_cells", "notes_of"]

Rule = Literal["missing", "unreadable", "marks", "decimals", "zeros", "mixed", "dates", "years", "rows"]

MAX_CELLS = 3
MAX_COLUMNS = 6


@dataclass(frozen=True)
class Cell:
    """A text that occurs in a column: the place of its first cell, and the number of cells that have it."""

    text: str
    place: str
    count: int


@dataclass(frozen=True)
class Finding:
    """A decision about cells of a column.

    Attributes
    ----------
    column : str
    rule : str
        "missing": they always stand for a missing value; "unreadable": they are none of the numbers or dates of their
        column and taken as missing; "marks": they are numbers with further marks; "decimals": numbers whose point could
        be between thousands; "zeros": they are numbers that begin with a zero; "mixed": they keep a column from being
        one of numbers; "dates": day and month can be swapped; "years": the year has two digits; "rows": the whole row
        is left out.
    cells : sequence of Cell
    note : str
        The decision in one sentence.
    """

    column: str
    rule: Rule
    cells: Sequence[Cell]
    note: str


def cells_of(texts: pl.Series, chosen: pl.Series, places: Places) -> list[Cell]:
    """Return the different texts among the chosen cells, in the order of the table."""
    found = pl.DataFrame({"text": texts, "row": pl.int_range(texts.len(), eager=True)}).filter(chosen)
    counted = found.group_by("text", maintain_order=True).agg(pl.col("row").first(), pl.len())
    return [Cell(text, places.name(row), count) for text, row, count in counted.iter_rows()]


def are(cells: Sequence[Cell]) -> str:
    """Return "is" for one cell, and "are" for several."""
    return "is" if sum(cell.count for cell in cells) == 1 else "are"


def describe_cells(cells: Sequence[Cell]) -> str:
    """Return the first cells in words.

    >>> describe_cells([Cell("-", "line 7", 1), Cell("NA", "line 9", 3)])
    "'-' in line 7, 'NA' in line 9 and 2 other cells"
    """
    parts = []
    for cell in cells[:MAX_CELLS]:
        more = f" and {cell.count - 1} other cell{'s' if cell.count > 2 else ''}" if cell.count > 1 else ""
        parts.append(f"{shown(cell.text)} in {cell.place}{more}")
    hidden = len(cells) - MAX_CELLS
    if hidden > 0:
        parts.append(f"and {hidden} other text{'s' if hidden > 1 else ''}")
    return ", ".join(parts)


def notes_of(findings: Iterable[Finding]) -> list[str]:
    """Return the notes; where a rule applies to many columns, those beyond the first are only named."""
    notes: list[str] = []
    columns: dict[Rule, list[str]] = {}
    for finding in findings:
        named = columns.setdefault(finding.rule, [])
        named.append(finding.column)
        if len(named) <= MAX_COLUMNS:
            notes.append(finding.note)
    for rule, named in columns.items():
        if len(named) > MAX_COLUMNS:
            notes.append(f"{len(named) - MAX_COLUMNS} more columns {SAME[rule]}: {', '.join(named[MAX_COLUMNS:])}")
    return notes


SAME: dict[Rule, str] = {
    "missing": "have texts that are taken as missing",
    "unreadable": "have cells that are taken as missing, as they are none of the numbers or dates of their column",
    "marks": "have numbers with further marks",
    "decimals": "have numbers whose point could be between thousands",
    "zeros": "have numbers that begin with a zero",
    "mixed": "have numbers among their categories",
    "dates": "have dates in which day and month can be swapped",
    "years": "have dates whose year has two digits",
    "rows": "have rows that are left out",
}
