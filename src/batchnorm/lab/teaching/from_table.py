"""The mini-batch of a worked example from a user's table: informative columns, and rows in which they vary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from batchnorm.errors import DataError
from batchnorm.lab.data.columns import has_scalars, running_index
from batchnorm.lab.data.stray_targets import check_target
from batchnorm.lab.data.tables import Table
from batchnorm.lab.data.target import MAX_NUMERIC_CLASSES
from batchnorm.lab.teaching.mini_batch import MiniBatch

__all__ = ["from_table"]

ROWS = 4
DIGITS = 3
"""Digits after the point of a scaled target, few enough for the cells of the page."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Target:
    """The target of each row as a number, NaN where it is missing; its groups; and a remark on the numbers."""

    values: Array
    groups: NDArray[np.int64]
    remark: str | None = None


@np.errstate(over="ignore", invalid="ignore")  # `worked_example` refuses numbers whose squares overflow
def from_table(table: Table) -> MiniBatch:
    """Return 4 complete rows of two columns that vary, and a target between 0 and 1.

    Of more than two columns of numbers, booleans or dates it takes those that tell most about the target: the largest
    share of a column's variance that lies between the classes, or that a line in the target explains. The rows are the
    first four, unless a column or the target has one value in them. One class becomes 1 and the others 0; any other
    number is scaled over the four rows.

    Raises
    ------
    DataError
        Fewer than two such columns vary, or the target holds lists or objects.
    """
    check_target(table.frame[table.target], table.findings, table.places, "regression", may_keep=False)
    target = _target(table.frame[table.target])
    columns = _usable_columns(table)
    chosen = _most_informative(columns, target)
    x = np.column_stack([columns[name] for name in chosen])
    complete = np.flatnonzero(np.isfinite(x).all(axis=1) & np.isfinite(target.values))
    rows = complete[_varied_rows(np.column_stack([x, target.values])[complete])]
    t, scaling = _scaled(target.values[rows], table.target)
    remarks = [
        _columns_remark(chosen, len(columns), table),
        *[_days_remark(table.frame[name]) for name in (*chosen, table.target)],
        f"The mini-batch is rows {_listed([str(row + 1) for row in rows])} of {table.name}, which has "
        f"{table.frame.height}.",
        target.remark or scaling,
        *(f"{note[:1].upper()}{note[1:]}." for note in table.notes),
    ]
    return MiniBatch(
        names=(chosen[0], chosen[1]),
        features=[tuple(row) for row in x[rows].tolist()],
        target_name=table.target,
        target=t.tolist(),
        remarks=[remark for remark in remarks if remark],
    )


def _columns_remark(chosen: list[str], usable: int, table: Table) -> str | None:
    if usable == len(chosen):
        return None
    return f"Of {usable} columns, {' and '.join(chosen)} tell most about {table.target}."


def _days_remark(column: pl.Series) -> str | None:
    if column.dtype in (pl.Date, pl.Datetime):
        first: object = column.min()
        return f"{column.name} counts days from {first}."
    return f"{column.name} is in days." if column.dtype.is_temporal() else None


def _usable_columns(table: Table) -> dict[str, Array]:
    """Return the columns of numbers, booleans and dates that vary and are no index, with NaN for what is missing."""
    columns, left_out = {}, []
    for column in table.frame.iter_columns():
        usable = column.dtype.is_numeric() or column.dtype.is_temporal() or column.dtype == pl.Boolean
        if column.name == table.target or not usable:
            continue
        values = _as_numbers(column)
        known = values[np.isfinite(values)]
        if running_index(column):
            left_out.append(f"{column.name} counts the rows")
        elif (known != known[:1]).any():
            columns[column.name] = values
        else:
            left_out.append(f"{column.name} has {'one value' if len(known) else 'no values'}")
    if len(columns) < 2:
        raise DataError(
            f"the worked example must have 2 columns of numbers besides the target; got "
            f"{'; '.join([', '.join(columns) or 'none', *left_out])}"
        )
    return columns


def _as_numbers(column: pl.Series) -> Array:
    """Return a column as numbers, dates as days since the first one, and NaN for what is missing or not finite."""
    if column.dtype.is_temporal():
        since = column - column.min() if column.dtype in (pl.Date, pl.Datetime) else column
        units = since.cast(pl.Int64)
        column = units / {"ns": 86_400e9, "us": 86_400e6, "ms": 86_400e3}[getattr(since.dtype, "time_unit", "ns")]
    values = column.cast(pl.Float64).fill_null(np.nan).to_numpy().copy()
    values[~np.isfinite(values)] = np.nan
    return values


def _target(column: pl.Series) -> _Target:
    """Return the target as numbers: of two classes the last is 1, of more classes that of the first row."""
    if not has_scalars(column):
        raise DataError(f"a target must hold numbers, texts or dates; {column.name!r} holds {column.dtype}")
    if column.null_count() == column.len():
        raise DataError(f"the target must have values; {column.name!r} has none")
    numeric = column.dtype.is_numeric() or column.dtype.is_temporal() or column.dtype == pl.Boolean
    if numeric:
        values = _as_numbers(column)
        known = np.unique(values[np.isfinite(values)])
        if (known == np.floor(known)).all() and len(known) <= MAX_NUMERIC_CLASSES and not column.dtype.is_temporal():
            groups = np.searchsorted(known, values)
            if set(known) <= {0.0, 1.0}:
                return _Target(values, groups)
        else:
            return _Target(values, np.full(len(values), -1))
    known_texts = column.drop_nulls()
    classes = known_texts.unique().sort()
    one = classes[-1] if classes.len() == 2 else known_texts[0]
    is_one = (column == one).cast(pl.Float64).fill_null(np.nan).to_numpy()
    numbers = pl.Series(range(classes.len()))
    groups = column.replace_strict(classes, numbers, default=-1, return_dtype=pl.Int64).to_numpy()
    others = {1: "", 2: f", and 0 for {classes[0]}"}.get(
        classes.len(), f", and 0 for each of the {classes.len() - 1} other classes"
    )
    return _Target(is_one, groups, f"{column.name}: 1 stands for {one}{others}.")


def _most_informative(columns: dict[str, Array], target: _Target) -> list[str]:
    """Return the names of the two columns that tell most about the target, in the order of the table."""
    scores = {name: _explained(values, target) for name, values in columns.items()}
    best = sorted(scores, key=lambda name: -scores[name])[:2]
    return [name for name in columns if name in best]


def _explained(values: Array, target: _Target) -> float:
    """Return the share of a column's variance that the target explains, 0 to 1."""
    known = np.isfinite(values) & np.isfinite(target.values)
    x, t, groups = values[known], target.values[known], target.groups[known]
    if len(x) < 3 or (x == x[0]).all() or (t == t[0]).all():
        return 0.0
    x = (x - x.mean()) / np.abs(x).max()  # squares of large numbers stay finite
    x -= x.mean()
    if (groups < 0).all():
        t = t / np.abs(t).max()
        t = t - t.mean()
        return float((x @ t) ** 2 / ((x @ x) * (t @ t)))
    totals, counts = np.bincount(groups, x), np.bincount(groups)
    return float((totals[counts > 0] ** 2 / counts[counts > 0]).sum() / (x @ x))


def _varied_rows(rows: Array) -> list[int]:
    """Return the first 4 rows, or earlier and later ones such that every column that varies does so in them.

    Row by row it takes the first one in which most of the columns that have had one value so far have another.
    """
    varies = (rows != rows[:1]).any(axis=0)
    chosen = list(range(min(ROWS, len(rows))))
    if (rows[chosen] != rows[:1]).any(axis=0)[varies].all():
        return chosen
    chosen = [0]
    while len(chosen) < ROWS:
        alike = varies & (rows[chosen] == rows[0]).all(axis=0)
        gains = (rows[:, alike] != rows[0, alike]).sum(axis=1)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
    return sorted(chosen)


def _scaled(target: Array, name: str) -> tuple[Array, str | None]:
    """Return numbers outside of 0 to 1 scaled to this range, which a neuron's output can reach, and say so."""
    if not len(target) or (target.min() >= 0 and target.max() <= 1):
        return target, None
    low, span = float(target.min()), float(np.ptp(target)) or 1.0
    scaled = ((target - low) / span).round(DIGITS)
    return scaled, f"{name} is scaled to 0 to 1 over these rows, and rounded: ({name} - {low:.7g}) / {span:.7g}."


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
