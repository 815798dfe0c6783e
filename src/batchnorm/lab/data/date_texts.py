"""Dates and times as people write them: 2020-01-31, 31/01/2020, 1/31/20 5:30 PM, 31 Jan 2020.

Polars reads them once year, month and day are in this order. In a date such as 03/04/2020 day and month can be swapped:
the other dates of a column decide, and then the other columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from batchnorm.lab.data.reading import DateOrder

__all__ = ["DateOrders", "count_date_orders", "has_short_year", "parse_dates", "parse_times"]

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAY = r"^(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*\.?,?\s+"
CANDIDATE = rf"\d[-/.]\d|\d\D?(?:{'|'.join(MONTHS)})|(?:{'|'.join(MONTHS)}).*\d"
"""Texts that can be a date, in lower case."""

SWAPPABLE = r"^(\d{1,2})([-/])(\d{1,2})[-/](\d{4}|\d{2})\b"
SHORT_YEAR = rf"^(?:\d{{1,2}}[-/.]\d{{1,2}}[-/.]|\d{{1,2}}[- ]?(?:{'|'.join(MONTHS)})[a-z]*\.?[- ,]*)\d\d(?:$|[t, ])"
CLOCKS = ("%H:%M", "%H:%M:%S%.f", "%I:%M %p", "%I:%M:%S %p")


@dataclass(frozen=True)
class DateOrders:
    """Numbers of dates of a column that can be read day first only, month first only, or both ways."""

    day: int = 0
    month: int = 0
    both: int = 0

    @property
    def shown_order(self) -> DateOrder | None:
        """The order that most dates have; None where no date shows it."""
        if self.day == self.month:
            return None
        return "day-first" if self.day > self.month else "month-first"


def _year_first(texts: pl.Series, order: DateOrder) -> pl.Series:
    """Return dates with the numbers of year, month and day in this order, and a blank before the time."""
    dates = texts.str.to_lowercase().str.replace(WEEKDAY, "")
    if dates.str.contains("[a-z]").any():
        for number, name in enumerate(MONTHS, 1):
            dates = dates.str.replace(rf"{name}[a-z]*\.?", f"m{number:02}")
        dates = dates.str.replace(r"^(\d{1,2})[- ]?m(\d\d)[- ,]*(\d{4}|\d{2})\b", "y$3-$2-$1")
        dates = dates.str.replace(r"^m(\d\d)[- ](\d{1,2}),?[- ]+(\d{4})\b", "y$3-$1-$2")
        dates = dates.str.replace(r"^(\d{4})[- ]?m(\d\d)[- ]?(\d{1,2})\b", "y$1-$2-$3")
    dates = dates.str.replace(r"^(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})\b", "y$1-$2-$3")
    dates = dates.str.replace(r"^(\d{1,2})\.(\d{1,2})\.(\d{4})\b", "y$3-$2-$1")
    dates = dates.str.replace(r"^(\d\d)\.(\d\d)\.(\d\d)\b", "y$3-$2-$1")
    dates = dates.str.replace(SWAPPABLE, "y$4-$3-$1" if order == "day-first" else "y$4-$1-$3")
    dates = dates.str.replace(r"^y([0-6]\d)-", "20$1-").str.replace(r"^y([7-9]\d)-", "19$1-").str.replace("^y", "")
    dates = dates.str.replace(r"^(\d{4}-\d{1,2}-\d{1,2})(?:t|,?\s+)(\d)", "$1 $2").str.replace(r"(\d)\s*z$", "$1+0000")
    return dates.str.replace(r"(\d)\s?([ap])\.?m\.?$", "$1 ${2}m").str.replace(
        r"(:\d\d(?:\.\d+)?)\s+([-+]\d\d)", "$1$2"
    )


def parse_dates(texts: pl.Series, order: DateOrder) -> pl.Series:
    """Return texts as dates, or as dates with times (in UTC where they have an offset); null for other texts.

    Examples
    --------
    >>> parse_dates(pl.Series(["31/01/2020", "5 Jan 2020", "Rome"]), "day-first").to_list()
    [datetime.date(2020, 1, 31), datetime.date(2020, 1, 5), None]
    """
    possible = texts.str.to_lowercase().str.contains(CANDIDATE)
    ordered = _year_first(texts.set(~possible.fill_null(True), None), order)
    days = ordered.str.to_date("%Y-%m-%d", strict=False)
    if days.null_count() == ordered.null_count():
        return days
    name = texts.name
    rest = ordered.set(days.is_not_null(), None).alias(name)
    times = [rest.str.to_datetime(f"%Y-%m-%d {clock}", strict=False, time_unit="us") for clock in CLOCKS]
    for clock in ("%H:%M%z", "%H:%M:%S%.f%z"):
        with_offset = rest.str.to_datetime(f"%Y-%m-%d {clock}", strict=False, time_unit="us", time_zone="UTC")
        times.append(with_offset.dt.replace_time_zone(None))
    if all(time.null_count() == time.len() for time in times):
        return days
    return pl.select(pl.coalesce(days.cast(pl.Datetime("us")), *times).alias(name)).to_series()


def has_short_year(texts: pl.Series) -> pl.Series:
    """Return which dates have a year of two digits.

    >>> has_short_year(pl.Series(["31/01/20", "31/01/2020", "2020-01-31", "5 Jan 99"])).to_list()
    [True, False, False, True]
    """
    return texts.str.to_lowercase().str.replace(WEEKDAY, "").str.contains(SHORT_YEAR).fill_null(False)


def parse_times(texts: pl.Series) -> pl.Series:
    """Return texts as times of day; null for other texts."""
    lower = texts.str.to_lowercase().str.replace(r"(\d)\s?([ap])\.?m\.?$", "$1 ${2}m")
    times = [lower.str.to_time(clock, strict=False) for clock in CLOCKS]
    return pl.select(pl.coalesce(*times).alias(texts.name)).to_series()


def count_date_orders(texts: pl.Series) -> DateOrders:
    """Count the dates of a column that show whether day or month is first, and those that do not."""
    swappable = texts.filter(texts.str.contains(SWAPPABLE).fill_null(False))
    if not swappable.len():
        return DateOrders()
    day = parse_dates(swappable, "day-first").cast(pl.Datetime("us"))
    month = parse_dates(swappable, "month-first").cast(pl.Datetime("us"))
    return DateOrders(
        day=int((day.is_not_null() & month.is_null()).sum()),
        month=int((month.is_not_null() & day.is_null()).sum()),
        both=int((day != month).sum()),
    )
