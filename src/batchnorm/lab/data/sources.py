"""Sources of tables: names and paths. Importing this file is cheap, so that the command line can check them early."""

from __future__ import annotations

from pathlib import Path

from batchnorm.errors import DataError

__all__ = ["BUILT_IN_NAMES", "check_source"]

BUILT_IN_NAMES = ("digits", "breast_cancer", "wine", "diabetes", "placement")
SUFFIXES = {".csv", ".tsv", ".parquet", ".npz"}


def check_source(data: str) -> None:
    """Raise `DataError` unless this is the name of a built-in data set or the path of a file of a known format."""
    path = Path(data)
    if data in BUILT_IN_NAMES:
        return
    if not path.exists():
        raise DataError(f"data must be a file or one of {', '.join(BUILT_IN_NAMES)}; there is no file {data!r}")
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        raise DataError(f"data must be a .csv, .tsv, .parquet or .npz file; got {data!r}")
