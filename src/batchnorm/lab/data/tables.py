"""Tables: built-in data sets by name, and CSV, TSV, Parquet and NPZ files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from polars.exceptions import PolarsError

from batchnorm.errors import DataError
from batchnorm.lab.data.sources import check_source

__all__ = ["BUILT_IN", "Table", "placement", "read_frame", "read_table", "target_of"]

MISSING = ["", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "?"]
SEPARATORS = ",;\t|"


@dataclass(frozen=True)
class Table:
    """Rows as they were read, and the column to predict."""

    name: str
    frame: pl.DataFrame
    target: str


def placement(rows: int = 1000, seed: int = 0) -> pl.DataFrame:
    """Generate students' cgpa and iq and whether they were placed; the same seed gives the same rows.

    cgpa is normal (mean 7, sd 1.2, clipped to 3 to 10), iq normal (mean 110, sd 25, whole numbers); the chance of a
    place is logistic in cgpa - 6.5 (weight 2 per point) and iq - 110 (weight 0.02 per point). The numbers are made up,
    not surveyed.

    >>> placement(3).columns
    ['cgpa', 'iq', 'placed']
    """
    generator = np.random.default_rng(seed)
    cgpa = np.clip(generator.normal(7.0, 1.2, rows), 3.0, 10.0).round(1)
    iq = generator.normal(110.0, 25.0, rows).round()
    chance = 1 / (1 + np.exp(-(2.0 * (cgpa - 6.5) + 0.02 * (iq - 110.0))))
    placed = (generator.random(rows) < chance).astype(np.int64)
    return pl.DataFrame({"cgpa": cgpa, "iq": iq, "placed": placed})


def _scikit_learn(name: str) -> pl.DataFrame:
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    features = pl.DataFrame(bunch.data, schema=[str(column) for column in bunch.feature_names])
    return features.with_columns(pl.Series("target", bunch.target))


BUILT_IN: dict[str, Callable[[], pl.DataFrame]] = {
    "digits": lambda: _scikit_learn("digits"),
    "breast_cancer": lambda: _scikit_learn("breast_cancer"),
    "wine": lambda: _scikit_learn("wine"),
    "diabetes": lambda: _scikit_learn("diabetes"),
    "placement": placement,
}


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2)


def _separator(path: Path) -> str:
    """Return the separator that is most frequent in the header line."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    with path.open("rb") as file:
        header = file.readline(1 << 20).decode("utf-8", errors="replace")
    return max(SEPARATORS, key=header.count)


def _read_text(path: Path) -> pl.DataFrame:
    separator = _separator(path)

    def read(decimal_comma: bool) -> pl.DataFrame:
        return pl.read_csv(
            path,
            separator=separator,
            null_values=MISSING,
            infer_schema_length=None,
            try_parse_dates=True,
            decimal_comma=decimal_comma,
        )

    frame = read(decimal_comma=False)
    texts = [column.drop_nulls() for column in frame.iter_columns() if column.dtype == pl.String]
    if separator == ";" and any(text.len() and text.str.contains(r"^\s*-?\d+,\d+\s*$").all() for text in texts):
        frame = read(decimal_comma=True)
    frame = frame.rename({column: " ".join(column.split()) for column in frame.columns})
    return frame.with_columns(_stripped(column) for column in frame.iter_columns() if column.dtype == pl.String)


def _stripped(texts: pl.Series) -> pl.Series:
    """Strip blanks around texts, and turn them into numbers where all of them are numbers."""
    texts = texts.str.strip_chars()
    numbers = texts.cast(pl.Float64, strict=False)
    return numbers if numbers.null_count() == texts.null_count() and texts.null_count() < texts.len() else texts


def _read_arrays(path: Path) -> pl.DataFrame:
    with np.load(path, allow_pickle=False) as arrays:
        columns: dict[str, np.ndarray] = {}
        for name in arrays.files:
            values = arrays[name]
            if values.dtype.kind not in "biufUM":
                raise DataError(f"arrays in an NPZ file must hold numbers, texts or dates; {name} holds {values.dtype}")
            if values.ndim not in (1, 2):
                raise DataError(f"arrays in an NPZ file must have 1 or 2 dimensions; {name} has {values.ndim}")
            new = {name: values} if values.ndim == 1 else {f"{name}_{i}": column for i, column in enumerate(values.T)}
            if duplicates := columns.keys() & new.keys():
                raise DataError(f"an NPZ file must have columns of different names; two are {min(duplicates)!r}")
            columns |= new
    lengths = {len(values) for values in columns.values()}
    if len(lengths) > 1:
        raise DataError(f"arrays in an NPZ file must have the same number of rows; got {sorted(lengths)}")
    return pl.DataFrame(columns)


def _read_file(path: Path) -> pl.DataFrame:
    suffix = path.suffix.lower()
    check_source(str(path))
    if suffix in (".csv", ".tsv") and _first_bytes(path) in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"a text file must be in UTF-8; {str(path)!r} is in UTF-16")
    if path.stat().st_size == 0:
        raise DataError(f"data must have rows; {str(path)!r} is empty")
    try:
        if suffix == ".parquet":
            return pl.read_parquet(path)
        return _read_arrays(path) if suffix == ".npz" else _read_text(path)
    except DataError:
        raise
    except PermissionError as error:
        raise DataError(f"data must be readable; {str(path)!r} is not") from error
    except (PolarsError, UnicodeError, ValueError, OSError, zipfile.BadZipFile) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")[:120]
        if suffix == ".npz":  # numpy advises to load it unsafely
            reason = "it is not an archive of numbers, texts or dates"
        raise DataError(f"data must be a table; {str(path)!r} can't be read as {suffix[1:]}: {reason}") from error


def read_table(data: str, target: str | None = None, rows: int | None = None) -> Table:
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

    Raises
    ------
    DataError
        The file does not exist, is not a table or is empty, or there is no such column.
    """
    if rows is not None and data != "placement":
        raise DataError(f"rows can be chosen for 'placement' alone, which is generated; got {rows} for {data!r}")
    name, frame = read_frame(data) if rows is None else ("placement", placement(rows))
    target = target_of(frame, data, target)
    if target is None:
        raise DataError(f"target must name the column to predict; the columns are {_first_columns(frame)}")
    return Table(name, frame, target)


def read_frame(data: str) -> tuple[str, pl.DataFrame]:
    """Read a built-in data set or a file; return its name and its rows.

    Raises
    ------
    DataError
        The file does not exist, is not a table or is empty.
    """
    if data in BUILT_IN:
        return data, BUILT_IN[data]()
    frame = _read_file(Path(data))
    if frame.height == 0:
        raise DataError(f"data must have rows; {data!r} has a header and none")
    return Path(data).stem, frame


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
        raise DataError(f"target must be a column of the data; got {target!r}, the columns are {_first_columns(frame)}")
    return target


def _first_columns(frame: pl.DataFrame) -> str:
    return ", ".join(frame.columns[:30]) + (", ..." if frame.width > 30 else "")
