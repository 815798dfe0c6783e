"""Places of cells, as a user finds them: the line of a file, or the row of a data frame."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["Places", "shown"]

LONGEST = 40


@dataclass(frozen=True)
class Places:
    """Names of the rows of a table.

    Attributes
    ----------
    numbers : sequence of int
        Line of the file at which each row begins, or number of each row, from 1; rows beyond them are counted.
    word : str
        "line" or "row".
    source : str
        Name of the file; empty for a data frame.
    """

    numbers: Sequence[int] = ()
    word: str = "row"
    source: str = ""

    @property
    def of_source(self) -> str:
        """The file in an error message: " of 'homes.csv'", or nothing."""
        return f" of {self.source!r}" if self.source else ""

    @classmethod
    def rows(cls, count: int) -> Places:
        """Return the names of the rows of a data frame."""
        return cls(range(1, count + 1))

    def name(self, row: int) -> str:
        """Return the name of a row, which is counted from 0.

        >>> Places.rows(3).name(0), Places([2, 5], "line").name(1)
        ('row 1', 'line 5')
        """
        return f"{self.word} {self.numbers[row] if row < len(self.numbers) else row + 1}"

    def without(self, rows: Collection[int]) -> Places:
        """Return the names of the rows that are left when some are taken out."""
        return Places([number for row, number in enumerate(self.numbers) if row not in rows], self.word, self.source)


def shown(text: str) -> str:
    """Return a cell as a message quotes it; the end of a long text is left out.

    >>> shown("-")
    "'-'"
    """
    return repr(text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}...")
