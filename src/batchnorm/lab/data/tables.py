"""Tables: built-in data sets by name, and CSV, TSV, Parquet and NPZ files."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from polars.exceptions import PolarsError

from batchnorm.errors import DataError
from batchnorm.lab.data.array_files import read_array_file
from batchnorm.lab.data.built_in import BUILT_IN, placement
from batchnorm.lab.data.findings import Finding
from batchnorm.lab.data.frames import ReadFrame, read_cells
from batchnorm.lab.data.names import check_columns, first_names, unknown_column
from batchnorm.lab.data.places import Places
from batchnorm.lab.data.reading import Reading
from batchnorm.lab.data.sources import check_source, kind_of
from batchnorm.lab.data.text_tables import read_text_table

__all__ = ["BUILT_IN", "Table", "placement", "read_frame", "read_table", "target_of"]

AS_IT_STANDS = Reading()
COUNTED = Places()


@dataclass(frozen=True)
class Table:
    """Rows as they were read, and the column to predict.

    Attributes
    ----------
    name : str
    frame : DataFrame
    target : str
    places : Places
        Names of the rows, for messages.
    findings : sequence of Finding
        Decisions about cells.
    notes : sequence of str
        All decisions in sentences.
    """

    name: str
    frame: pl.DataFrame
    target: str
    places: Places = COUNTED
    findings: Sequence[Finding] = ()
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, name: str, read: ReadFrame, target: str) -> Table:
        """Return the table of a frame that was read."""
        return cls(name, read.frame, target, read.places, read.findings, read.notes)


def read_table(
    data: str, target: str | None = None, rows: int | None = None, *, reading: Reading = AS_IT_STANDS
) -> Table:
    """Read a built-in data set or a file.

    Parameters
    ----------
    data : str
        "digits", "breast_cancer", "wine", "diabetes", "placement", or the path of a CSV, TSV, Parquet or NPZ file. In
        an NPZ file each 1-dimensional array, and each column of a 2-dimensional one, is a column of the table.
    target : str, optional
        The column to predict. Built-in data sets have a default; for a file it is the column "y".
    rows : int, optional
        Number of rows to generate, for placement alone.
    reading : Reading
        Decisions that the table itself leaves open.

    Raises
    ------
    DataError
        The file does not exist, is not a table or is empty, or there is no such column.
    """
    if rows is not None and data != "placement":
        raise DataError(f"rows can be chosen for 'placement' alone, which is generated; got {rows} for {data!r}")
    if rows is None:
        name, read = read_frame(data, reading)
    else:
        name, read = "placement", ReadFrame(placement(rows), Places.rows(rows))
    target = target_of(read.frame, data, target)
    if target is None:
        raise DataError(f"target must name the column to predict; the columns are {first_names(read.frame.columns)}")
    return Table.of(name, read, target)


def read_frame(data: str, reading: Reading = AS_IT_STANDS) -> tuple[str, ReadFrame]:
    """Read a built-in data set or a file; return its name and its rows.

    Raises
    ------
    DataError
        The file does not exist, is not a table or is empty.
    """
    if data in BUILT_IN:
        frame = BUILT_IN[data]()
        check_columns(reading.numeric, reading.categorical, frame.columns)
        return data, ReadFrame(frame, Places.rows(frame.height))
    read = _read_file(Path(data), reading)
    if read.frame.height == 0:
        raise DataError(f"data must have rows; {data!r} has a header and none")
    check_columns(reading.numeric, reading.categorical, read.frame.columns)
    return Path(data).name.removesuffix(".gz").rpartition(".")[0], read


def _read_file(path: Path, reading: Reading) -> ReadFrame:
    check_source(str(path))
    kind = kind_of(path)
    if path.stat().st_size == 0:
        raise DataError(f"data must have rows; {str(path)!r} is empty")
    try:
        if kind == "parquet":
            return read_cells(pl.read_parquet(path), reading)
        return read_cells(read_array_file(path), reading) if kind == "npz" else read_text_table(path, reading)
    except DataError:
        raise
    except PermissionError as error:
        raise DataError(f"data must be readable; {str(path)!r} is not") from error
    except (PolarsError, csv.Error, UnicodeError, ValueError, OSError, zipfile.BadZipFile) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")[:120]
        if kind == "npz":  # numpy advises to load it unsafely
            reason = "it is not an archive of numbers, texts or dates"
        raise DataError(f"data must be a table; {str(path)!r} can't be read as {kind}: {reason}") from error


def target_of(frame: pl.DataFrame, data: str, target: str | None) -> str | None:
    """Return the column to predict: the given one, the default of a built-in data set, the one called "y", or None.

    Raises
    ------
    DataError
        There is no such column.
    """
    if target is None and data in BUILT_IN:
        return frame.columns[-1]
    if target is None:
        return "y" if "y" in frame.columns else None
    if target not in frame.columns:
        raise unknown_column("target must be a column of the data", target, frame.columns)
    return target
