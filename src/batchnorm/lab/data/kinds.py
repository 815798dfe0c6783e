"""The kinds of the columns of texts: numbers, truth values, dates, times or categories.

A column of which at least 90% of the cells are of one kind is of this kind. The other cells are missing values, and a
finding names them.
"""

from __future__ import annotations

import polars as pl

from batchnorm.errors import DataError
from batchnorm.lab.data import kind_findings
from batchnorm.lab.data.conventions import Conventions, conventions_of, plain_columns
from batchnorm.lab.data.date_texts import DateOrders, parse_dates, parse_times
from batchnorm.lab.data.findings import Finding, are, cells_of, describe_cells
from batchnorm.lab.data.kind_findings import MIN_SHARE
from batchnorm.lab.data.missing import is_placeholder, stripped, without_missing
from batchnorm.lab.data.number_texts import ambiguous_cells, parse_numbers, plain_numbers
from batchnorm.lab.data.places import Places, shown
from batchnorm.lab.data.reading import DateOrder, Reading

__all__ = ["read_kinds"]

MIN_MIXED = 0.1
"""Share of the filled cells that are numbers or dates, from which a column of categories is worth a note."""

NO_CODE = r"^\P{L}*$|\d\s+\p{L}"
"""Numbers without letters, or with a unit behind a blank; 12B is more likely a code."""


def read_kinds(
    frame: pl.DataFrame, reading: Reading, places: Places, *, semicolons: bool = False
) -> tuple[pl.DataFrame, list[Finding]]:
    """Return a table in which texts of numbers and dates have become these, and the findings.

    Parameters
    ----------
    frame : DataFrame
        Columns that hold no texts are left as they are, except for the values that the user calls missing.
    reading : Reading
    places : Places
        Names of the rows.
    semicolons : bool
        Whether the cells of the file were separated by semicolons, as where the comma is the decimal mark.
    """
    findings: list[Finding] = []
    texts: dict[str, pl.Series] = {}
    columns: dict[str, pl.Series] = {}
    plain, marks = plain_columns(frame, reading, semicolons=semicolons)
    for column in frame.iter_columns():
        if column.name in plain:
            columns[column.name] = plain[column.name]
            kind_findings.add_zeros(column, places, findings)
            continue
        if column.dtype != pl.String:
            columns[column.name] = _without_given_numbers(column, reading)
            continue
        tidy = stripped(column)
        known = without_missing(tidy, reading.missing)
        columns[column.name] = texts[column.name] = known
        gone = known.is_null() & (tidy != "").fill_null(False)
        if gone.any():
            cells = cells_of(tidy, gone, places)
            note = f"column {column.name}: {describe_cells(cells)} {are(cells)} taken as missing"
            findings.append(Finding(column.name, "missing", cells, note))
    undecided = {name: column for name, column in texts.items() if name not in reading.categorical}
    conventions = conventions_of(undecided, marks, semicolons=semicolons)
    for name, column in undecided.items():
        values = _read_column(column, reading, places, conventions, findings)
        columns[name] = _without_given_numbers(values, reading)
    return pl.DataFrame(list(columns.values())), findings


def _without_given_numbers(column: pl.Series, reading: Reading) -> pl.Series:
    """Return a column of numbers without the values that the user calls missing, such as -999."""
    given = plain_numbers(pl.Series(list(reading.missing), dtype=pl.String)).drop_nulls()
    if not given.len() or not column.dtype.is_numeric():
        return column
    return column.set(column.cast(pl.Float64).is_in(given.to_list()).fill_null(False), None)


def _read_column(
    texts: pl.Series, reading: Reading, places: Places, conventions: Conventions, findings: list[Finding]
) -> pl.Series:
    """Return a column as the kind that most of its cells have, and append to the findings."""
    name = texts.name
    filled = texts.is_not_null() & ~is_placeholder(texts).fill_null(False)
    count = int(filled.sum())
    numbers, marked = parse_numbers(texts, comma=name in conventions.commas)
    forced = name in reading.numeric and numbers.null_count() < texts.len()
    if forced or _enough(numbers, filled, count):
        if marked.any():
            findings.append(kind_findings.marks(texts, numbers, marked, places))
        elif name in conventions.undecided and (unsure := ambiguous_cells(texts)).any():
            findings.append(kind_findings.decimals(texts, numbers, unsure, places))
        kind_findings.add_zeros(texts, places, findings)
        kind_findings.add_unreadable(texts, numbers, "numbers", places, findings)
        return numbers
    if not count:
        return texts
    orders = conventions.orders.get(name, DateOrders())
    order = reading.dates or orders.shown_order or conventions.order or "day-first"
    lower = texts.str.to_lowercase()
    truth = lower.replace_strict({"true": True, "false": False}, default=None, return_dtype=pl.Boolean)
    shares = {"numbers": int((numbers.is_not_null() & texts.str.contains(NO_CODE)).sum())}
    for kind, values in (
        ("true or false", truth),
        ("dates", parse_dates(texts, order)),
        ("times", parse_times(texts)),
    ):
        if _enough(values, filled, count):
            if kind == "dates" and orders.both and reading.dates is None:
                findings.append(kind_findings.date_order(texts, order, orders, conventions.order, places))
            if kind == "dates":
                kind_findings.add_short_years(texts, values, places, findings)
            kind_findings.add_unreadable(texts, values, kind, places, findings)
            return values
        shares[kind] = values.len() - values.null_count()
    if reading.dates is not None:
        _check_order(texts, reading.dates, filled, count, places)
    kind = max(shares, key=lambda kind: shares[kind])
    if shares[kind] >= MIN_MIXED * count:
        values = {"numbers": numbers, "dates": parse_dates(texts, order), "times": parse_times(texts)}.get(kind, truth)
        findings.append(kind_findings.mixed(texts, values, kind, count, places))
    return texts


def _enough(values: pl.Series, filled: pl.Series, count: int) -> bool:
    return count > 0 and int((values.is_not_null() & filled).sum()) >= MIN_SHARE * count


def _check_order(texts: pl.Series, order: DateOrder, filled: pl.Series, count: int, places: Places) -> None:
    """Raise an error if a column has dates in the other order than the user says."""
    other: DateOrder = "month-first" if order == "day-first" else "day-first"
    found = parse_dates(texts, other)
    if _enough(found, filled, count):
        cell = cells_of(texts, found.is_not_null() & parse_dates(texts, order).is_null(), places)[0]
        raise DataError(
            f"dates must be the order of all dates; got {order!r}, and column {texts.name!r}{places.of_source} has "
            f"{shown(cell.text)} in {cell.place}. Pass dates={other!r}, or categorical={texts.name!r} to keep its texts"
        )
