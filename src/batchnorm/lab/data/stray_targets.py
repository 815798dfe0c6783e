"""Stray cells of a target: one of them must not make a class, or turn classes into numbers, without an error."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl

from batchnorm.errors import DataError
from batchnorm.lab.data.findings import Finding, are, cells_of, describe_cells
from batchnorm.lab.data.missing import is_placeholder, is_symbol
from batchnorm.lab.data.places import Places, shown
from batchnorm.lab.data.target import MAX_NUMERIC_CLASSES, Task

__all__ = ["check_target"]

MAX_STRAY = 0.1
"""Share of the rows up to which cells that do not fit the others are stray."""


def check_target(
    column: pl.Series, findings: Iterable[Finding], places: Places, task: Task | None, *, may_keep: bool = True
) -> None:
    """Raise `DataError` if a target has a cell that does not fit the others; the message names it.

    Parameters
    ----------
    column : Series
        The target, as it was read.
    findings : iterable of Finding
        Decisions about its cells.
    places : Places
        Names of the rows.
    task : "classification", "regression" or None
        The task that was asked for.
    may_keep : bool
        Whether the option ``categorical`` can keep the cells as classes.
    """
    keep = f", or pass categorical={column.name!r} to keep it as a class" if may_keep and task != "regression" else ""
    rules = {finding.rule: finding for finding in findings if finding.column == column.name}
    for rule in ("unreadable", "mixed"):
        if rule in rules and (rule == "unreadable" or _are_few(column, rules[rule])):
            kind = "dates" if column.dtype.is_temporal() else "numbers"
            kind = "true and false" if column.dtype == pl.Boolean else kind
            raise DataError(
                f"a target of {kind} must not have other cells; in {column.name!r}{places.of_source} there "
                f"{are(rules[rule].cells)} {describe_cells(rules[rule].cells)}. Correct it, or pass "
                f"missing={rules[rule].cells[0].text!r} to leave out such rows{keep}"
            )
    if task is None and "marks" in rules:
        _check_marks(column, rules["marks"], places, keep)
    if column.dtype == pl.String:
        _check_texts(column, places, keep)
    elif column.dtype.is_float() and task is None:
        _check_whole(column, places)


def _are_few(column: pl.Series, finding: Finding) -> bool:
    """Return whether the cells that keep a column from being one of numbers are at most half of it."""
    return 2 * sum(cell.count for cell in finding.cells) <= column.len() - column.null_count()


def _check_marks(column: pl.Series, finding: Finding, places: Places, keep: str) -> None:
    """Refuse a few numbers with further marks, such as "1-", among whole numbers that look like classes."""
    known = column.drop_nulls()
    if not column.dtype.is_numeric() or known.n_unique() > MAX_NUMERIC_CLASSES:
        return
    if sum(cell.count for cell in finding.cells) <= MAX_STRAY * known.len():
        raise DataError(
            f"a target of classes must not have numbers with further marks; in {column.name!r}{places.of_source} there "
            f"{are(finding.cells)} {describe_cells(finding.cells)}. Correct it, or pass "
            f"missing={finding.cells[0].text!r} to leave out such rows{keep}"
        )


def _check_texts(column: pl.Series, places: Places, keep: str) -> None:
    placeholders = cells_of(column, is_placeholder(column).fill_null(False), places)
    for cell in placeholders:
        if is_symbol(cell.text) or cell.count <= MAX_STRAY * column.len():
            raise DataError(
                f"a class must not be a text that stands for a missing value; {column.name!r}{places.of_source} has "
                f"{describe_cells([cell])}. Pass missing={cell.text!r} to leave out such rows{keep}"
            )
    folded: dict[str, str] = {}
    for text in column.drop_nulls().unique(maintain_order=True):
        other = folded.setdefault(" ".join(text.split()).casefold(), text)
        if other != text:
            cells = cells_of(column, column.is_in([text, other]).fill_null(False), places)
            rare = min(cells, key=lambda cell: cell.count)
            raise DataError(
                f"classes must differ in more than case and blanks; {column.name!r}{places.of_source} has "
                f"{shown(other)} and {shown(text)} ({describe_cells([rare])}). Correct the rarer one{keep}"
            )


def _check_whole(column: pl.Series, places: Places) -> None:
    """Refuse a few numbers with decimals among whole numbers that look like classes."""
    known = column.drop_nulls().drop_nans()
    stray = (column != column.round()).fill_null(False)
    whole = known.filter(known == known.round())
    if 0 < stray.sum() <= MAX_STRAY * known.len() and whole.n_unique() <= MAX_NUMERIC_CLASSES:
        cells = cells_of(column.cast(pl.String), stray, places)
        raise DataError(
            f"a target must be classes or numbers; {column.name!r}{places.of_source} has {whole.n_unique()} different "
            f"whole numbers, as classes have, and {describe_cells(cells)}. Correct it, or pass task='regression' for "
            "a number"
        )
