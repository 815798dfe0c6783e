"""Odd files, as people and programs write them: odd_files/expected.toml says what each must be read as."""

import gzip
import io
import math
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from batchnorm.errors import DataError
from batchnorm.lab.data.reading import Reading
from batchnorm.lab.data.tables import read_frame

FOLDER = Path(__file__).parent / "odd_files"
EXPECTED = tomllib.loads((FOLDER / "expected.toml").read_text(encoding="utf-8"))
TEXTS = [path.name for path in FOLDER.iterdir() if path.suffix in (".csv", ".tsv")]

SIZES = ["35", "41", "28", "52", "60", "33", "47", "39", "55", "44", "30", "58"]
PLAIN = "size,city,y\n" + "".join(f"{size},Orléans,{i % 2}\n" for i, size in enumerate(SIZES))
COLUMNS = {"size": [*SIZES[:-1], "-"], "y": [i % 2 for i in range(12)]}


def workbook():
    """The first files of an Excel workbook, which is a ZIP archive."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return content.getvalue()


def saved(write):
    content = io.BytesIO()
    write(content)
    return content.getvalue()


MADE = {
    "latin1.csv": PLAIN.encode("latin-1"),
    "utf16.csv": PLAIN.encode("utf-16"),
    "utf16_without_mark.csv": PLAIN.encode("utf-16-le"),
    "utf32.csv": PLAIN.encode("utf-32"),
    "utf8_mark.csv": PLAIN.encode("utf-8-sig"),
    "gzip.csv": gzip.compress(PLAIN.encode()),
    "packed.csv.gz": gzip.compress(PLAIN.encode()),
    "cut.csv": gzip.compress(PLAIN.encode())[:-9],
    "workbook.csv": workbook(),
    "old_workbook.csv": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500),
    "parquet.csv": saved(pl.DataFrame(COLUMNS).write_parquet),
    "npz.csv": saved(lambda file: np.savez(file, y=np.arange(12))),
    "nul.csv": b"size,y\n35,0\n4\x001,1\n",
    "long_cell.csv": PLAIN.encode().replace("Orléans".encode(), b"x" * 200_000, 1),
    "categories.parquet": saved(pl.DataFrame(COLUMNS, schema_overrides={"size": pl.Categorical}).write_parquet),
    "texts.parquet": saved(pl.DataFrame(COLUMNS).write_parquet),
    "texts.npz": saved(lambda file: np.savez(file, **{name: np.array(column) for name, column in COLUMNS.items()})),
}


def test_the_table_of_expectations_names_every_file():
    assert sorted([*TEXTS, *MADE]) == sorted(EXPECTED)
    assert len(EXPECTED) > 40


@pytest.mark.parametrize("name", EXPECTED)
def test_an_odd_file_is_read_as_expected(tmp_path, monkeypatch, name):
    expected = EXPECTED[name]
    content = MADE[name] if name in MADE else (FOLDER / name).read_bytes()
    (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    reading = Reading(**expected.get("options", {}))
    if "error" in expected:
        with pytest.raises(DataError) as error:
            read_frame(name, reading)
        assert expected["error"] in str(error.value)
        assert "\n" not in str(error.value)
        return
    _, read = read_frame(name, reading)
    assert read.frame.columns == expected.get("columns", read.frame.columns)
    assert read.frame.height == expected.get("rows", read.frame.height)
    for note in expected.get("notes", []):
        assert note in "\n".join(read.notes)
    if "notes" not in expected:
        assert read.notes == []
    if "values" in expected:
        size = read.frame["size"]
        assert str(size.dtype) == expected["kind"]
        assert [plain(value) for value in size] == [plain(value) for value in expected["values"]]


def plain(value):
    """Return a value as the table of expectations has it: NaN, which equals nothing, and dates as texts."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return value if isinstance(value, int | float | str) else str(value)
