"""The data of a figure as a file: comma-separated values, numbers of nine digits."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Cell", "Data"]

Cell = str | float | None
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclass(frozen=True)
class Data:
    """Columns and rows of numbers, words and gaps; ``about`` describes them."""

    about: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def csv(self) -> str:
        """Return the data as CSV; a gap is an empty cell.

        >>> print(Data("steps", ["name", "steps"], [["=1+1", 93], ["b", None]]).csv(), end="")
        name,steps
        '=1+1,93
        b,
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([_cell(column) for column in self.columns])
        writer.writerows([_cell(cell) for cell in row] for row in self.rows)
        return text.getvalue()


def _cell(value: Cell) -> str:
    """Return a cell as text; quote a word that a spreadsheet would evaluate, because names come from users' files."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(FORMULA) else value
    return f"{value:.9g}"
