"""Built-in data sets, and files that are read as tables."""

import numpy as np
import polars as pl
import pytest

from batchnorm.errors import DataError
from batchnorm.lab.data.tables import BUILT_IN, placement, read_table

FRAME = pl.DataFrame({"a": [1.5, 2.5, None], "city": ["Rome", "Oslo", None], "y": [0, 1, 0]})


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_data_sets_know_their_target(name):
    table = read_table(name)
    assert table.target in table.frame.columns
    assert table.frame.height > 100


def test_placement_is_the_same_for_a_seed_at_any_size():
    assert placement(50).equals(placement(50))
    assert not placement(50, seed=1).equals(placement(50))
    assert read_table("placement", rows=5000).frame.height == 5000


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_a_csv_is_read_with_any_separator(tmp_path, separator):
    path = tmp_path / ("data.tsv" if separator == "\t" else "data.csv")
    FRAME.write_csv(path, separator=separator, null_value="NA")
    assert read_table(str(path), "y").frame.equals(FRAME)


def test_a_parquet_file_is_read(tmp_path):
    FRAME.write_parquet(tmp_path / "data.parquet")
    assert read_table(str(tmp_path / "data.parquet"), "y").frame.equals(FRAME)


def test_arrays_become_columns_and_y_is_the_target_where_none_is_named(tmp_path):
    X = np.arange(12.0).reshape(4, 3)
    np.savez(tmp_path / "data.npz", X=X, y=np.array([0, 1, 0, 1]))
    table = read_table(str(tmp_path / "data.npz"))
    assert table.target == "y"
    assert table.frame.columns == ["X_0", "X_1", "X_2", "y"]
    assert np.array_equal(table.frame.drop("y").to_numpy(), X)


def test_decimal_commas_and_blanks_around_numbers_are_read_as_numbers(tmp_path):
    (tmp_path / "comma.csv").write_text("a;y\n1,5;0\n2,25;1\n")
    assert read_table(str(tmp_path / "comma.csv"), "y").frame["a"].to_list() == [1.5, 2.25]
    (tmp_path / "blanks.csv").write_text("a , y\n 1.5 , 0\n 2.25 , 1\n")
    assert read_table(str(tmp_path / "blanks.csv"), "y").frame["a"].to_list() == [1.5, 2.25]


def bad_files(folder):
    (folder / "empty.csv").write_text("")
    (folder / "header.csv").write_text("a,b\n")
    (folder / "picture.csv").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe\x00\x01,\xff\n\xfe")
    (folder / "broken.parquet").write_bytes(b"PAR1 no")
    (folder / "broken.npz").write_bytes(b"PK no")
    (folder / "notes.txt").write_text("a,b\n1,2\n")
    (folder / "ragged.csv").write_text("a,b\n1,2\n1,2,3\n")
    (folder / "folder.csv").mkdir()
    np.savez(folder / "lengths.npz", a=np.zeros(3), b=np.zeros(4))
    np.savez(folder / "cube.npz", a=np.zeros((2, 2, 2)))
    np.savez(folder / "complex.npz", a=np.zeros(3, complex))
    np.savez(folder / "twice.npz", a=np.zeros((3, 2)), a_1=np.zeros(3))
    np.savez(folder / "pickled.npz", a=np.array([{}], dtype=object))


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("absent.csv", "a", "there is no file .*absent.csv"),
        ("empty.csv", "a", "must have rows; .*empty.csv' is empty"),
        ("header.csv", "a", "must have rows; .*header.csv' has a header and none"),
        ("picture.csv", "a", "must be a table; .*picture.csv' can't be read as csv"),
        ("broken.parquet", "a", "must be a table; .*can't be read as parquet"),
        ("broken.npz", "a", "must be a table; .*can't be read as npz"),
        ("pickled.npz", "a", "must be a table; .*can't be read as npz"),
        ("ragged.csv", "a", "must be a table; .*can't be read as csv"),
        ("notes.txt", "a", "must be a .csv, .tsv, .parquet or .npz file; got .*notes.txt"),
        ("folder.csv", "a", "must be a .csv, .tsv, .parquet or .npz file"),
        ("lengths.npz", "a", r"same number of rows; got \[3, 4\]"),
        ("complex.npz", "a", "numbers, texts or dates; a holds complex128"),
        ("twice.npz", "a", "different names; two are 'a_1'"),
        ("cube.npz", "a", "1 or 2 dimensions; a has 3"),
    ],
)
def test_a_file_that_is_not_a_table_is_refused_in_one_sentence(tmp_path, name, target, message):
    bad_files(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        read_table(str(tmp_path / name), target)
    assert "\n" not in str(error.value)


def test_an_unknown_or_unnamed_target_is_answered_with_the_columns(tmp_path):
    FRAME.drop("y").write_csv(tmp_path / "data.csv")
    for target in ("price", None):
        with pytest.raises(DataError, match=r"^target must .*the columns are a, city"):
            read_table(str(tmp_path / "data.csv"), target)


def test_only_placement_has_any_number_of_rows():
    with pytest.raises(DataError, match=r"rows can be chosen for 'placement' alone, .*; got 50 for 'wine'"):
        read_table("wine", rows=50)
