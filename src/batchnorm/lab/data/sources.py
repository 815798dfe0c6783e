"""Sources of tables: names and paths. Importing this file is cheap, so that the command line can check them early."""

from __future__ import annotations

from pathlib import Path

from batchnorm.errors import DataError

__all__ = ["BUILT_IN_NAMES", "check_source", "kind_of"]

BUILT_IN_NAMES = ("digits", "breast_cancer", "wine", "diabetes", "placement")
KINDS = ("csv", "tsv", "parquet", "npz")
SHEETS = ("xlsx", "xls", "xlsm", "ods")


def kind_of(path: Path) -> str:
    """Return the ending of a file in lower case, without the one that its compression added.

    >>> kind_of(Path("homes.CSV.gz"))
    'csv'
    """
    name = path.name.lower()
    for packed in (".gz", ".bz2", ".xz"):
        if name.endswith((f".csv{packed}", f".tsv{packed}")):
            name = name.removesuffix(packed)
    return name.rpartition(".")[2] if "." in name else ""


def check_source(data: str) -> None:
    """Raise `DataError` unless this is the name of a built-in data set or the path of a file of a known format."""
    path = Path(data)
    if data in BUILT_IN_NAMES:
        return
    if not path.exists():
        raise DataError(f"data must be a file or one of {', '.join(BUILT_IN_NAMES)}; there is no file {data!r}")
    if not path.is_file() or kind_of(path) not in KINDS:
        way_out = (
            "save its sheet as CSV" if kind_of(path) in SHEETS else "a table in a text file must have the ending .csv"
        )
        raise DataError(f"data must be a .csv, .tsv, .parquet or .npz file; got {data!r}: {way_out}")
