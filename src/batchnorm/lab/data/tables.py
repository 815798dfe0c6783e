"""Where the rows come from: built-in data sets by name, and CSV, TSV, Parquet and NPZ files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from polars.exceptions import PolarsError

from batchnorm.errors import DataError

__all__ = ["BUILT_IN", "Table", "placement", "read_frame", "read_table", "target_of"]

MISSING = ["", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "?"]
SUFFIXES = {".csv", ".tsv", ".parquet", ".npz"}
SEPARATORS = ",;\t|"


@dataclass(frozen=True)
class Table:
    """Rows as they were read, and which column is to be predicted."""

    name: str
    frame: pl.DataFrame
    target: str


def placement(rows: int = 1000, seed: int = 0) -> pl.DataFrame:
    """Students' cgpa and iq and whether they were placed, generated: the same rows for the same seed.

    cgpa is normal (mean 7, sd 1.2, kept within 3 to 10), iq normal (mean 110, sd 25, whole numbers); the chance
    of a place is logistic in cgpa - 6.5 (weight 2 a point) and iq - 110 (weight 0.02 a point). Ours, not a survey.

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
    """The separator that the header line has most of."""
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
    """Texts without the blanks around them, as numbers where all are."""
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
            if twice := columns.keys() & new.keys():
                raise DataError(f"columns of an NPZ file must have different names; two are {min(twice)!r}")
            columns |= new
    lengths = {len(values) for values in columns.values()}
    if len(lengths) > 1:
        raise DataError(f"arrays in an NPZ file must have the same number of rows; got {sorted(lengths)}")
    return pl.DataFrame(columns)


def _read_file(path: Path) -> pl.DataFrame:
    suffix = path.suffix.lower()
    if not path.exists():
        raise DataError(f"DATA must be a file or one of {', '.join(BUILT_IN)}; there is no file {str(path)!r}")
    if not path.is_file() or suffix not in SUFFIXES:
        raise DataError(f"DATA must be a .csv, .tsv, .parquet or .npz file; got {str(path)!r}")
    if suffix in (".csv", ".tsv") and _first_bytes(path) in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"a text file must be in UTF-8; {str(path)!r} is in UTF-16")
    if path.stat().st_size == 0:
        raise DataError(f"DATA must have rows; {str(path)!r} is empty")
    try:
        if suffix == ".parquet":
            return pl.read_parquet(path)
        return _read_arrays(path) if suffix == ".npz" else _read_text(path)
    except DataError:
        raise
    except PermissionError as error:
        raise DataError(f"DATA must be readable; {str(path)!r} is not") from error
    except (PolarsError, UnicodeError, ValueError, OSError, zipfile.BadZipFile) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")[:120]
        if suffix == ".npz":  # numpy's own advice is to load it unsafely
            reason = "it is no archive of plain arrays"
        raise DataError(f"DATA must be a table; {str(path)!r} can't be read as {suffix[1:]}: {reason}") from error


def read_table(data: str, target: str | None = None, rows: int | None = None) -> Table:
    """Read a built-in data set or a file.

    Parameters
    ----------
    data : str
        "digits", "breast_cancer", "wine", "diabetes", "placement", or the path of a CSV, TSV, Parquet or NPZ
        file. An NPZ file's 1-dimensional arrays are columns, and so is each column of its 2-dimensional ones.
    target : str, optional
        The column to predict; a built-in data set knows its own, and a file's may be left out when called "y".
    rows : int, optional
        How many rows to generate, for placement alone.

    Raises
    ------
    DataError
        No such file, not a table, empty, or no such column.
    """
    if rows is not None and data != "placement":
        raise DataError(f"only placement is generated at any number of rows; got rows={rows} with {data!r}")
    name, frame = read_frame(data) if rows is None else ("placement", placement(rows))
    target = target_of(frame, data, target)
    if target is None:
        raise DataError(f"--target must name the column to predict; the columns are {_some_columns(frame)}")
    return Table(name, frame, target)


def read_frame(data: str) -> tuple[str, pl.DataFrame]:
    """Read a built-in data set or a file, whatever it is for: its name and its rows.

    Raises
    ------
    DataError
        No such file, not a table, or empty.
    """
    if data in BUILT_IN:
        return data, BUILT_IN[data]()
    frame = _read_file(Path(data))
    if frame.height == 0:
        raise DataError(f"DATA must have rows; {data!r} has a header and none")
    return Path(data).stem, frame


def target_of(frame: pl.DataFrame, data: str, target: str | None) -> str | None:
    """The column to predict: the one given, a built-in data set's own, the one called "y", or None.

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
        raise DataError(
            f"--target must be a column of the data; got {target!r}, the columns are {_some_columns(frame)}"
        )
    return target


def _some_columns(frame: pl.DataFrame) -> str:
    return ", ".join(frame.columns[:30]) + (", ..." if frame.width > 30 else "")
