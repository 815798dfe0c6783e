"""The options that decide how a table is read. Importing this file is cheap: the command line does it early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from batchnorm.errors import DataError

__all__ = ["DateOrder", "Reading"]

DateOrder = Literal["day-first", "month-first"]


@dataclass(frozen=True)
class Reading:
    """Decisions of the user about a table that the table itself leaves open.

    Attributes
    ----------
    missing : sequence of str
        Further texts that stand for a missing value, in any column.
    dates : "day-first", "month-first" or None
        Order of dates such as 03/04/2020; None takes the order that the dates themselves show.
    header : bool or None
        Whether the first line of a text file has the names of the columns; None raises an error where it looks like a
        row.
    numeric, categorical : sequence of str
        Columns to take as numbers or as categories, regardless of their values.
    """

    missing: Sequence[str] = ()
    dates: DateOrder | None = None
    header: bool | None = None
    numeric: Sequence[str] = ()
    categorical: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.missing, str):
            raise DataError(f"missing must be a list of texts; got the text {self.missing!r}")
        if self.dates not in (None, *get_args(DateOrder)):
            raise DataError(f"dates must be {' or '.join(get_args(DateOrder))}; got {self.dates!r}")
