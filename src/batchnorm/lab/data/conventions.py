"""The decimal mark, and the order of day and month, on which the columns of a table agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl
from polars import selectors as cs

from batchnorm.lab.data.date_texts import DateOrders, count_date_orders
from batchnorm.lab.data.number_texts import (
    DecimalMarks,
    ambiguous_cells,
    count_decimal_marks,
    count_plain_marks,
    only_plain_numbers,
)
from batchnorm.lab.data.reading import DateOrder, Reading

__all__ = ["Conventions", "conventions_of", "plain_columns"]


@dataclass(frozen=True)
class Conventions:
    """Decimal mark and order of dates that the columns of a table agree on.

    Attributes
    ----------
    commas : set of str
        Columns in which ambiguous numbers have a decimal comma: those whose other numbers show it, and if no column
        shows a decimal point, all others too where one shows a comma or the cells were separated by semicolons.
    undecided : set of str
        Columns whose own numbers show neither, in a table in which both marks are possible.
    order : "day-first", "month-first" or None
        The order that the dates of other columns show.
    orders : dict of str to DateOrders
    """

    commas: set[str]
    undecided: set[str]
    order: DateOrder | None
    orders: Mapping[str, DateOrders]


def plain_columns(
    frame: pl.DataFrame, reading: Reading, *, semicolons: bool
) -> tuple[dict[str, pl.Series], dict[str, DecimalMarks]]:
    """Return the columns of texts that are plain numbers whatever the others hold, and their decimal marks.

    A column with a number such as 1.234 is none of them where a comma can be the decimal mark.
    """
    if reading.missing:
        return {}, {}
    plain: dict[str, pl.Series] = {}
    commas = semicolons
    for column in frame.select(cs.string().exclude(reading.categorical)).iter_columns():
        numbers = only_plain_numbers(column)
        if numbers is not None:
            plain[column.name] = numbers
        else:
            commas = commas or bool(column.str.contains(r",\d").any())
    if not commas:
        return plain, {}
    decimals = {name: numbers for name, numbers in plain.items() if numbers.dtype.is_float()}
    ambiguous = {name for name in decimals if ambiguous_cells(frame[name]).any()}
    marks = {name: count_plain_marks(frame[name]) for name in decimals if name not in ambiguous}
    return {name: numbers for name, numbers in plain.items() if name not in ambiguous}, marks


def conventions_of(
    texts: Mapping[str, pl.Series], plain: Mapping[str, DecimalMarks], *, semicolons: bool
) -> Conventions:
    """Return the decimal mark and the order of dates on which the columns of a table agree.

    Parameters
    ----------
    texts : dict of str to Series
        Columns that are not known to be plain numbers.
    plain : dict of str to DecimalMarks
        Decimal marks of the columns of plain numbers.
    semicolons : bool
        Whether the cells of the file were separated by semicolons, as where the comma is the decimal mark.
    """
    marks: dict[str, DecimalMarks] = {}
    if semicolons or any(column.str.contains(r",\d").any() for column in texts.values()):
        marks = {name: count_decimal_marks(column) for name, column in texts.items()}
    commas = {name for name, found in marks.items() if found.show_comma}
    shown = [*marks.values(), *plain.values()]
    if (commas or semicolons) and not any(found.point > found.comma for found in shown):
        commas = {name for name, found in marks.items() if found.show_comma or not found.point}
    orders = {name: count_date_orders(column) for name, column in texts.items()}
    shown_orders = {found.shown_order for found in orders.values()} - {None}
    order = shown_orders.pop() if len(shown_orders) == 1 else None
    either = semicolons or any(found.show_comma for found in shown)
    undecided = {name for name, found in marks.items() if either and not found.comma and not found.point}
    return Conventions(commas, undecided, order, orders)
