"""Tables from NPZ files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from batchnorm.errors import DataError

__all__ = ["read_array_file"]


def read_array_file(path: Path) -> pl.DataFrame:
    """Read an NPZ file: each 1-dimensional array is a column, and so is each column of a 2-dimensional one.

    Raises
    ------
    DataError
        An array is of another kind, shape or length than a column; the message names it.
    """
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
