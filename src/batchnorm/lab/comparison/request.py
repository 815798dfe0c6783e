"""The request for a comparison: a data set that can be read from its source, and the claims to measure."""

from __future__ import annotations

from dataclasses import dataclass, field

from batchnorm.errors import RunError
from batchnorm.lab.data.dataset import Dataset, Task, prepare
from batchnorm.lab.data.reading import DateOrder, Reading
from batchnorm.lab.data.tables import read_table

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """The data and the claims that a comparison was asked for.

    Attributes
    ----------
    data : str or None
        Name of a built-in data set or path of a file; None where the data came from Python.
    target : str or None
        Column to predict.
    rows : int or None
        Rows to generate.
    task : "classification" or "regression", optional
    numeric, categorical : list of str
        Columns to take as numbers or as categories.
    claims : list of str
        Names of the claims to measure.
    missing : list of str
        Further texts that stand for a missing value.
    dates : "day-first", "month-first" or None
        Order of dates that can be read both ways.
    header : bool or None
        Whether the first line of a text file has the names of the columns.
    """

    data: str | None = None
    target: str | None = None
    rows: int | None = None
    task: Task | None = None
    numeric: list[str] = field(default_factory=list)
    categorical: list[str] = field(default_factory=list)
    claims: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    dates: DateOrder | None = None
    header: bool | None = None

    @property
    def reading(self) -> Reading:
        """The decisions about the table that the table itself leaves open."""
        return Reading(
            missing=self.missing,
            dates=self.dates,
            header=self.header,
            numeric=self.numeric,
            categorical=self.categorical,
        )

    def read(self, seed: int) -> Dataset:
        """Return the data set, with the rows split by a seed.

        Raises
        ------
        RunError
            The data came from Python, so they can't be read again.
        DataError
            The data can't be used.
        """
        if self.data is None:
            raise RunError("a run must name its data to be resumed; the data of this one came from Python")
        return prepare(
            read_table(self.data, self.target, self.rows, reading=self.reading),
            task=self.task,
            numeric=self.numeric,
            categorical=self.categorical,
            seed=seed,
        )
