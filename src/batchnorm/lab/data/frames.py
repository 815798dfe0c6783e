"""Tables as they were read: the columns with their kinds, the places of the rows, and all that was decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
from polars import selectors as cs

from batchnorm.lab.data.findings import Finding, notes_of
from batchnorm.lab.data.kinds import read_kinds
from batchnorm.lab.data.places import Places
from batchnorm.lab.data.reading import Reading
from batchnorm.lab.data.summary_rows import without_summary_rows

__all__ = ["ReadFrame", "read_cells"]


@dataclass(frozen=True)
class ReadFrame:
    """A table whose cells were read.

    Attributes
    ----------
    frame : DataFrame
    places : Places
        Names of the rows.
    findings : sequence of Finding
        Decisions about cells.
    further_notes : sequence of str
        Decisions about the file.
    """

    frame: pl.DataFrame
    places: Places
    findings: Sequence[Finding] = ()
    further_notes: Sequence[str] = ()

    @property
    def notes(self) -> list[str]:
        """All decisions in sentences."""
        return [*self.further_notes, *notes_of(self.findings)]


def read_cells(
    frame: pl.DataFrame,
    reading: Reading,
    *,
    places: Places | None = None,
    semicolons: bool = False,
    notes: Sequence[str] = (),
) -> ReadFrame:
    """Read the texts of a table as numbers, dates, categories and missing values.

    Parameters
    ----------
    frame : DataFrame
    reading : Reading
    places : Places or None
        Names of the rows; None counts them.
    semicolons : bool
        Whether the cells of the file were separated by semicolons.
    notes : sequence of str
        Decisions that were taken before.
    """
    frame = frame.with_columns(cs.by_dtype(pl.Categorical, pl.Enum).cast(pl.String))
    kept, places, summed = without_summary_rows(frame, places or Places.rows(frame.height))
    typed, findings = read_kinds(kept, reading, places, semicolons=semicolons)
    return ReadFrame(typed, places, [*summed, *findings], notes)
