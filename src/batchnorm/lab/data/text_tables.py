"""Tables from text files: CSV, TSV and their relatives, as people and spreadsheets write them."""

from __future__ import annotations

import csv
from pathlib import Path

import polars as pl

from batchnorm.errors import DataError
from batchnorm.lab.data.dialect import as_tabbed, separator_of, split_separator_line
from batchnorm.lab.data.frames import ReadFrame, read_cells
from batchnorm.lab.data.headers import looks_like_row
from batchnorm.lab.data.names import unique_names
from batchnorm.lab.data.places import Places, shown
from batchnorm.lab.data.reading import Reading
from batchnorm.lab.data.records import Records, read_records
from batchnorm.lab.data.sources import kind_of
from batchnorm.lab.data.text_files import read_text, refusal

__all__ = ["read_text_table"]

MAX_SHOWN = 6


def read_text_table(path: Path, reading: Reading) -> ReadFrame:
    """Read a text file as a table.

    Raises
    ------
    DataError
        The file is no table, or its first line may be a row; the message names the line.
    """
    text, notes = read_text(path)
    text, separator = split_separator_line(text)
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    separator = separator or ("\t" if kind_of(path) == "tsv" and "\t" in text else separator_of(text))
    if separator is None and (tabbed := as_tabbed(text)) is not None:
        text, separator = tabbed, "\t"
        notes.append(f"the cells of {path.name} are separated by blanks")
    with_header = reading.header is not False
    records = read_records(text, separator or ",", path, header_is_row=not with_header)
    if not records.header:
        raise DataError(f"data must have rows; {str(path)!r} has none")
    semicolons = separator == ";"
    if not with_header:
        records = _with_first_row(records)
    elif reading.header is None and len(records.header) > 2 and len([c for c in records.header if c.strip()]) == 1:
        raise refusal(
            path,
            f"line {records.header_line} has one name for {len(records.header)} columns: delete it if it is a title, "
            "or pass header=True",
        )
    names, renamed = unique_names(records.header)
    frame = records.cells.rename(dict(zip(records.cells.columns, names, strict=True)))
    unnamed = [name for name, cell in zip(names, records.header, strict=True) if with_header and not cell.strip()]
    frame = frame.drop(name for name in unnamed if _is_empty(frame[name]))
    notes = [*notes, *renamed, *records.notes]
    read = read_cells(frame, reading, places=records.places, semicolons=semicolons, notes=notes)
    kept = [cell for name, cell in zip(names, records.header, strict=True) if name in frame.columns]
    if reading.header is None and looks_like_row(kept, read.frame, repeated=records.repeated):
        raise DataError(_may_be_row(path, records))
    return read


def _with_first_row(records: Records) -> Records:
    """Return records whose first one is a row too, and whose columns are numbered."""
    first = pl.DataFrame([pl.Series(str(i), [cell], dtype=pl.String) for i, cell in enumerate(records.header)])
    places = Places([records.header_line, *records.places.numbers], "line", records.places.source)
    numbered = [f"column_{i}" for i in range(1, len(records.header) + 1)]
    return Records(numbered, records.header_line, pl.concat([first, records.cells]), places, records.notes)


def _is_empty(column: pl.Series) -> bool:
    return bool((column.fill_null("").str.strip_chars() == "").all())


def _may_be_row(path: Path, records: Records) -> str:
    cells = ", ".join(shown(cell.strip()) for cell in records.header[:MAX_SHOWN])
    more = ", ..." if len(records.header) > MAX_SHOWN else ""
    return (
        f"a file must begin with the names of its columns; line {records.header_line} of {str(path)!r} looks like a "
        f"row: {cells}{more}. Pass header=False if it is a row (the columns are then column_1, column_2, ...), or "
        "header=True if these are names"
    )
