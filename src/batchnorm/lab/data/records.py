"""The records of a text file: its cells as texts, each record with the line at which it begins."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import polars as pl

from batchnorm.errors import DataError
from batchnorm.lab.data.places import Places, shown
from batchnorm.lab.data.text_files import refusal

__all__ = ["Records", "read_records"]

CHUNK = 20_000
SPREADSHEET_ERRORS = ("#N/A", "#NA", "#REF!", "#DIV/0!", "#VALUE!", "#NAME?", "#NUM!", "#NULL!")


@dataclass(frozen=True)
class Records:
    """The cells of a text file.

    Attributes
    ----------
    header : list of str
        The cells of the first record.
    header_line : int
        The line of the first record.
    cells : DataFrame
        The cells of the other records, as texts; a missing cell at the end of a short record is null.
    places : Places
        The lines of these records.
    notes : list of str
        Sentences about records that were left out or completed.
    repeated : bool
        Whether records that repeat the header were left out.
    """

    header: list[str]
    header_line: int
    cells: pl.DataFrame
    places: Places
    notes: list[str] = field(default_factory=list)
    repeated: bool = False


Row = tuple[int, list[str]]
"""The line at which a record begins, and its cells."""


@dataclass
class _Lines:
    """Lines that one rule applies to: their number, and the first one."""

    count: int = 0
    first: int = 0

    def add(self, line: int) -> None:
        self.first = self.first or line
        self.count += 1

    def describe(self, one: str, many: str) -> list[str]:
        if not self.count:
            return []
        return [
            f"line {self.first} {one}" if self.count == 1 else f"{self.count} lines {many} (first: line {self.first})"
        ]


@dataclass
class _Body:
    """The records below the header, collected row by row."""

    header: list[str]
    header_line: int
    may_repeat: bool
    comments: _Lines
    empty: _Lines = field(default_factory=_Lines)
    repeated: _Lines = field(default_factory=_Lines)
    short: _Lines = field(default_factory=_Lines)
    long: _Lines = field(default_factory=_Lines)
    lines: list[int] = field(default_factory=list)
    chunk: list[Sequence[str | None]] = field(default_factory=list)
    frames: list[pl.DataFrame] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Number of cells of the header."""
        return len(self.header)

    def add(self, row: Row, path: Path, separator: str) -> None:
        """Add a record, unless it is a comment or has no values."""
        line, cells = row
        if _is_comment(cells, self.width):
            self.comments.add(line)
        elif not any(cell.strip() for cell in cells):
            self.empty.add(line)
        elif self.may_repeat and cells == self.header:
            self.repeated.add(line)
        elif any(cell.strip() for cell in cells[self.width :]):
            raise _ragged(path, separator, (self.header_line, self.width), row)
        else:
            if len(cells) != self.width:
                (self.short if len(cells) < self.width else self.long).add(line)
            self.lines.append(line)
            self.chunk.append([*cells[: self.width], *[None] * (self.width - len(cells))])
            if len(self.chunk) == CHUNK:
                self.flush()

    def flush(self) -> None:
        """Turn the collected records into a data frame, which takes less memory."""
        columns = zip(*self.chunk, strict=True) if self.chunk else ([] for _ in range(self.width))
        self.frames.append(
            pl.DataFrame([pl.Series(str(i), c, dtype=pl.String) for i, c in enumerate(map(list, columns))])
        )
        self.chunk = []

    @property
    def notes(self) -> list[str]:
        """Sentences about the lines that were left out or completed."""
        cells = f"cell{'s' if self.width > 1 else ''}"
        return [
            *self.comments.describe("is a comment and is left out", "are comments and are left out"),
            *self.empty.describe("has no values and is left out", "have no values and are left out"),
            *self.repeated.describe("repeats the header and is left out", "repeat the header and are left out"),
            *self.short.describe(
                f"has fewer than {self.width} cells; the last are missing",
                f"have fewer than {self.width} cells; the last are missing",
            ),
            *self.long.describe(
                f"has an empty cell after its {self.width} {cells}",
                f"have an empty cell after their {self.width} {cells}",
            ),
        ]


def read_records(text: str, separator: str, path: Path, *, header_is_row: bool = False) -> Records:
    """Split a text into records and cells.

    Empty lines and comments (``#`` at the beginning) are left out. Cells that a record has too many of must be empty;
    cells that it lacks at its end are missing. Records that repeat a header of names are left out, unless the header is
    known to be a row.

    Raises
    ------
    DataError
        A record has more cells than the first one, or a quote is not closed; the message names the line.
    """
    rows = _rows(text, separator, path)
    comments = _Lines()
    commented: Row | None = None
    for row in rows:
        if _is_comment(row[1], 0):
            comments.add(row[0])
            commented = row
        elif any(cell.strip() for cell in row[1]):
            break
    else:
        return Records([], 0, pl.DataFrame(), Places())
    header, first = row, []
    if commented and _is_commented_header(commented, row):
        header, first = (commented[0], _without_hash(commented[1])), [row]
        comments.count -= 1
    may_repeat = not header_is_row and all(_has_letters(cell) for cell in header[1])
    body = _Body(header[1], header[0], may_repeat, comments)
    for row in chain(first, rows):
        body.add(row, path, separator)
    body.flush()
    return Records(
        header[1],
        header[0],
        pl.concat(body.frames),
        Places(body.lines, "line", path.name),
        body.notes,
        body.repeated.count > 0,
    )


def _rows(text: str, separator: str, path: Path) -> Iterator[Row]:
    """Yield the line and the cells of each record that is not empty."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    last = text.count("\n") + (not text.endswith("\n"))
    line, header = 1, 0
    split: list[str] = []
    for row in reader:
        if line < last == reader.line_num and "\n".join(text.split("\n")[line - 1 :]).count('"') % 2:
            raise refusal(
                path, f'a quote that line {line} opens is not closed; write "" for a quote within a quoted cell'
            )
        if row:
            if header and reader.line_num > line:
                split = split or text.split("\n")
                _check_lines(split, separator, path, (header, line, reader.line_num))
            elif not header and any(row) and not _is_comment(row, 0):
                header = line
            yield line, row
        line = reader.line_num + 1


def _check_lines(split: Sequence[str], separator: str, path: Path, lines: tuple[int, int, int]) -> None:
    """Raise an error if rows stand between the first and last line of a record, which two stray quotes have joined.

    A line is such a row if it has as many cells as the header. One with a blank behind a separator is more likely a
    sentence, unless the header has blanks too.
    """
    header, first, last = lines
    width = split[header - 1].count(separator)
    spaced = f"{separator} " in split[header - 1]
    rows = [
        line
        for line in range(first, last + 1)
        if split[line - 1].count(separator) == width > 0 and (spaced or f"{separator} " not in split[line - 1])
    ]
    between = [line for line in rows if first < line < last]
    if 2 * len(between) > last - first - 1 or (rows[:1] == [first] and rows[-1] == last):
        raise refusal(
            path,
            f"a quote joins lines {first} to {last} to one record, and line {(between or [last])[0]} looks like a row; "
            f'take out the quotes in lines {first} and {last}, or write "" for a quote within a quoted cell',
        )


def _is_comment(cells: Sequence[str], width: int) -> bool:
    """Tell a comment from a record whose first cell begins with "#"."""
    if not cells[0].startswith("#") or cells[0].startswith(SPREADSHEET_ERRORS):
        return False
    return len(cells) != width or cells[0].startswith("# ")


def _is_commented_header(comment: Row, record: Row) -> bool:
    """Return whether a comment has the names of the columns: "# size,y", as numpy.savetxt writes it, or "#city,y".

    It is above the first record and has as many names, all different. Above a record that begins with a text, a comment
    has a blank behind the "#".
    """
    names, cells = [name.strip() for name in _without_hash(comment[1])], record[1]
    if not len(names) == len(cells) == len(set(names)) > 1 or not all(names) or comment[0] + 1 != record[0]:
        return False
    if _has_letters(cells[0]) and (comment[1][0].startswith("# ") or names == [cell.strip() for cell in cells]):
        return False
    return _has_letters("".join(names))


def _without_hash(cells: Sequence[str]) -> list[str]:
    return [cells[0].lstrip("# "), *cells[1:]]


def _has_letters(text: str) -> bool:
    return any(character.isalpha() for character in text)


def _ragged(path: Path, separator: str, header: tuple[int, int], record: Row) -> DataError:
    (header_line, width), (line, row) = header, record
    way_out = f"put a cell that contains the separator {separator!r} in quotes"
    if any("\n" in cell for cell in row):
        way_out = "a quote that is not closed may join its lines"
    elif width == 1:
        way_out = f"delete line {header_line} if it is a title, or {way_out}"
    return refusal(
        path,
        f"every line must have as many cells as the first one; line {header_line} has {width} and line {line} has "
        f"{len(row)}, of which {shown(row[width].strip())} is the first too many: {way_out}",
    )
