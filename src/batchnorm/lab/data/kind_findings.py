"""Findings about columns that are read as numbers or dates, or are kept as categories."""

from __future__ import annotations

import polars as pl

from batchnorm.lab.data.date_texts import DateOrders, has_short_year, parse_dates
from batchnorm.lab.data.findings import Finding, are, cells_of, describe_cells
from batchnorm.lab.data.places import Places, shown
from batchnorm.lab.data.reading import DateOrder

__all__ = ["MIN_SHARE", "add_short_years", "add_unreadable", "add_zeros", "date_order", "decimals", "marks", "mixed"]

MIN_SHARE = 0.9
"""Share of the filled cells that make a column one of numbers or dates."""

IS_NOT: dict[str, tuple[str, str]] = {
    "numbers": ("is no number", "are no numbers"),
    "dates": ("is no date", "are no dates"),
    "times": ("is no time", "are no times"),
    "true or false": ("is neither true nor false", "are neither true nor false"),
}
"""The verb phrases of notes about one cell, or several, that are not of the kind of their column."""


def marks(texts: pl.Series, numbers: pl.Series, marked: pl.Series, places: Places) -> Finding:
    """Return a finding about numbers with further marks, such as a currency or a percent sign."""
    row = int(marked.arg_true()[0])
    value = numbers[row]
    count = int(marked.sum())
    example = f"{shown(texts[row])} in {places.name(row)} is read as {value:.15g}"
    more = f", and {count - 1} other number{'s' if count > 2 else ''} with such marks" if count > 1 else ""
    cells = cells_of(texts, marked, places)
    return Finding(texts.name, "marks", cells, f"column {texts.name}: {example}{more}")


def decimals(texts: pl.Series, numbers: pl.Series, unsure: pl.Series, places: Places) -> Finding:
    """Return a finding about numbers with a point that could be between thousands."""
    cell = cells_of(texts, unsure, places)[0]
    value = numbers[int(unsure.arg_true()[0])]
    note = f"column {texts.name}: {shown(cell.text)} in {cell.place} is read as {value:.15g}"
    return Finding(texts.name, "decimals", [], f"{note}, as the point is the decimal mark of other columns")


def add_unreadable(texts: pl.Series, values: pl.Series, kind: str, places: Places, findings: list[Finding]) -> None:
    """Append a finding about the cells that are not of the kind of their column."""
    unreadable = values.is_null() & texts.is_not_null()
    if unreadable.any():
        cells = cells_of(texts, unreadable, places)
        several = sum(cell.count for cell in cells) > 1
        note = f"column {texts.name}: {describe_cells(cells)} {IS_NOT[kind][several]} and taken as missing"
        findings.append(Finding(texts.name, "unreadable", cells, note))


def add_zeros(texts: pl.Series, places: Places, findings: list[Finding]) -> None:
    """Append a finding about numbers that begin with a zero, as postal codes do."""
    zeros = texts.str.contains(r"^[-+]?0\d").fill_null(False)
    if zeros.any():
        cells = cells_of(texts, zeros, places)
        note = (
            f"column {texts.name}: {describe_cells(cells)} {are(cells)} read as a number, without the zero; the "
            "option categorical keeps a column of codes as it is"
        )
        findings.append(Finding(texts.name, "zeros", cells, note))


def mixed(texts: pl.Series, values: pl.Series, kind: str, count: int, places: Places) -> Finding:
    """Return a finding about numbers or dates that are too few to make their column one of them."""
    cells = cells_of(texts, values.is_null() & texts.is_not_null(), places)
    found = values.len() - values.null_count()
    way_out = "; the option numeric takes the others as missing" if kind == "numbers" else ""
    note = (
        f"column {texts.name} is taken as categories, since {found} of {count} cells are {kind}, fewer than "
        f"{MIN_SHARE:.0%}; not so {describe_cells(cells)}{way_out}"
    )
    return Finding(texts.name, "mixed", cells, note)


def date_order(
    texts: pl.Series, order: DateOrder, orders: DateOrders, elsewhere: DateOrder | None, places: Places
) -> Finding:
    """Return a finding about the order in which dates are read that can be read in both."""
    words = order.replace("-", " ")
    if orders.shown_order:
        other: DateOrder = "month-first" if order == "day-first" else "day-first"
        shows = parse_dates(texts, order).is_not_null() & parse_dates(texts, other).is_null()
        cell = cells_of(texts, shows, places)[0]
        reason = f"as {shown(cell.text)} in {cell.place} shows"
    elif elsewhere:
        reason = "as another column shows"
    else:
        both = parse_dates(texts, "day-first") != parse_dates(texts, "month-first")
        cell = cells_of(texts, both.fill_null(False), places)[0]
        others = f" and {orders.both - 1} other{'s' if orders.both > 2 else ''}" if orders.both > 1 else ""
        reason = f"but {shown(cell.text)} in {cell.place}{others} can be month first too; the option dates decides"
    return Finding(texts.name, "dates", [], f"column {texts.name}: dates are read {words}, {reason}")


def add_short_years(texts: pl.Series, dates: pl.Series, places: Places, findings: list[Finding]) -> None:
    """Append a finding about dates whose year has two digits."""
    short = has_short_year(texts) & dates.is_not_null()
    if short.any():
        cells = cells_of(texts, short, places)
        date = dates[int(short.arg_true()[0])]
        note = (
            f"column {texts.name}: {shown(cells[0].text)} in {cells[0].place} is in the year {date.year}; years of two "
            "digits are 1970 to 2069"
        )
        findings.append(Finding(texts.name, "years", [], note))
