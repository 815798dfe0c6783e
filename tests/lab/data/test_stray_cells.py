"""One stray cell: it never changes the kind of a column silently, and never makes a class."""

import csv
import io

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchnorm.errors import DataError
from batchnorm.lab.data.arrays import table_from_arrays
from batchnorm.lab.data.conventions import plain_columns
from batchnorm.lab.data.dataset import prepare
from batchnorm.lab.data.missing import stripped
from batchnorm.lab.data.places import shown
from batchnorm.lab.data.reading import Reading
from batchnorm.lab.data.tables import read_table

ODD = ["-", "#N/A", "<NA>", "N.A.", ".", "missing", " NA ", "prefer not to say", "total", "1,234.5", "$213,700", "1.3%"]
ODD += [
    "(1,200)",
    "1,735 sqft",
    "\u22125",
    "2,5",
    "1.234,5",
    "1,234",
    "2020-01-31",
    "true",
    "12:30",
    "# x",
    "inf",
    "0x1F",
]

stray_texts = st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)
columns = st.one_of(
    st.lists(st.integers(-999, 99_999).map(str), min_size=4, max_size=40),
    st.lists(st.floats(-99, 99).map(lambda x: f"{x:.3f}"), min_size=11, max_size=40),
    st.lists(st.floats(0, 9e6).map(lambda x: f"{x:,.2f}"), min_size=4, max_size=40),
    st.lists(st.floats(0, 99).map(lambda x: f"{x:.2f}".replace(".", ",")), min_size=4, max_size=40),
    st.lists(st.integers(1, 999).map(lambda x: f"${x}"), min_size=4, max_size=40),
)


def written(cells, separator=","):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator="\n")
    writer.writerows([("city", "size", "y"), *(("Rome", cell, i % 2) for i, cell in enumerate(cells))])
    return text.getvalue()


def read(folder, content, target="y", **options):
    path = folder / "data.csv"
    path.write_text(content, encoding="utf-8")
    return read_table(str(path), target, reading=Reading(**options))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(columns, st.data(), stray_texts, st.sampled_from([",", ";", "\t"]))
def test_a_stray_cell_never_changes_a_column_silently(tmp_path, cells, data, stray, separator):
    """The other cells keep their values and the column its kind, or a note names the column, the line and the cell."""
    row = data.draw(st.integers(0, len(cells) - 1))
    before = read(tmp_path, written(cells, separator)).frame["size"]
    assert before.dtype.is_numeric()
    table = read(tmp_path, written([*cells[:row], stray, *cells[row + 1 :]], separator))
    after = table.frame["size"]
    tidy = stripped(pl.Series([stray]))[0]
    note = next((note for note in table.notes if note.startswith("column size")), "")
    named = f"{shown(tidy)} in line {row + 2}" in note
    if not after.dtype.is_numeric():
        assert len(cells) < 10
        assert named
        return
    others = [i for i in range(len(cells)) if i != row]
    assert after.gather(others).to_list() == before.gather(others).to_list()
    assert named or not tidy or "such marks" in note or float(tidy) == after[row]


@pytest.mark.parametrize("stray", ["-", ".", "missing", "oops", "#", "1 or 0"])
def test_a_stray_cell_of_a_0_1_target_is_an_error(tmp_path, stray):
    content = "size,y\n" + "".join(f"{i * 7 % 11},{i % 2}\n" for i in range(30)) + f"5,{stray}\n7,{stray}\n"
    table = read(tmp_path, content)
    with pytest.raises(
        DataError,
        match=r"in 'y' of 'data.csv' there are '.*' in line 32 and 1 other cell. Correct it, or pass missing=",
    ):
        prepare(table)
    left_out = read(tmp_path, content, missing=[stray])
    assert prepare(left_out).classes == ["0", "1"]
    assert any("in line 32" in note for note in left_out.notes)
    kept = read(tmp_path, content, categorical=["y"])
    assert prepare(kept, categorical=["y"]).classes == sorted(["0", "1", stray])


@pytest.mark.parametrize("stray", ["1-", "1%", "(1)"])
def test_a_few_numbers_with_marks_make_no_class(tmp_path, stray):
    content = "size,y\n" + "".join(f"{i * 7 % 11},{i % 2}\n" for i in range(30)) + f"5,{stray}\n7,{stray}\n"
    with pytest.raises(DataError, match=r"further marks; in 'y' of 'data.csv' there are '.*' in line 32 and 1 other"):
        prepare(read(tmp_path, content))


def test_codes_of_a_digit_and_a_letter_are_classes(tmp_path):
    content = "size,y\n" + "".join(f"{i * 7 % 11},{['3A', '4A', '3B'][i % 3]}\n" for i in range(30))
    assert prepare(read(tmp_path, content)).classes == ["3A", "3B", "4A"]


@pytest.mark.parametrize("missing", ["", "NA", "#N/A", " NA ", "<NA>"])
def test_a_missing_target_leaves_its_row_out(tmp_path, missing):
    content = "size,y\n" + "".join(f"{i * 7 % 11},{i % 2}\n" for i in range(30)) + f"5,{missing}\n7,{missing}\n"
    data = prepare(read(tmp_path, content))
    assert data.classes == ["0", "1"]
    assert "2 rows without a value of y are not used" in data.notes


@pytest.mark.parametrize(
    ("stray", "words"),
    [
        ("-", "a class must not be a text that stands for a missing value; 'y' of 'data.csv' has '-' in line 32"),
        (
            "unknown",
            "a class must not be a text that stands for a missing value; 'y' of 'data.csv' has 'unknown' in line 32",
        ),
        (
            "Yes",
            "classes must differ in more than case and blanks; 'y' of 'data.csv' has 'yes' and 'Yes' .'Yes' in line 32",
        ),
        ("oops", "every class must have at least 2 rows; in 'y' oops has 1"),
    ],
)
def test_a_stray_cell_of_a_target_of_texts_is_an_error(tmp_path, stray, words):
    content = "size,y\n" + "".join(f"{i * 7 % 11},{['no', 'yes'][i % 2]}\n" for i in range(30)) + f"5,{stray}\n"
    with pytest.raises(DataError, match=words):
        prepare(read(tmp_path, content))


def test_numbers_may_be_a_minority_of_the_classes(tmp_path):
    content = "size,y\n" + "".join(f"{i * 7 % 11},{['none', 'many', '1'][i % 3]}\n" for i in range(30))
    assert prepare(read(tmp_path, content)).classes == ["1", "many", "none"]


def test_a_frequent_class_may_be_called_unknown(tmp_path):
    content = "size,y\n" + "".join(f"{i * 7 % 11},{['no', 'yes', 'unknown'][i % 3]}\n" for i in range(30))
    assert prepare(read(tmp_path, content)).classes == ["no", "unknown", "yes"]


def test_a_fraction_among_classes_is_an_error_unless_the_task_is_named(tmp_path):
    content = "size,y\n" + "".join(f"{i * 7 % 11},{i % 2}\n" for i in range(30)) + "5,0.5\n"
    table = read(tmp_path, content)
    with pytest.raises(DataError, match=r"2 different whole numbers, as classes have, and '0.5' in line 32"):
        prepare(table)
    assert prepare(table, task="regression").task == "regression"


def test_prices_with_marks_are_a_target_of_numbers(tmp_path):
    content = "size,y\n" + "".join(f'{i % 7},"${i * 1000:,}"\n' for i in range(30))
    assert prepare(read(tmp_path, content)).task == "regression"


ROWS = 30
RANDOM = np.random.default_rng(0)


def objects(stray):
    values = RANDOM.normal(size=(ROWS, 2)).astype(object)
    values[4, 0] = stray
    return values


@pytest.mark.parametrize(
    "make",
    [
        objects,
        lambda stray: objects(stray).astype(str),
        lambda stray: pl.DataFrame(
            {"x1": [*map(str, range(4)), stray, *map(str, range(25))], "x2": RANDOM.normal(size=ROWS)}
        ),
    ],
    ids=["array of objects", "array of texts", "Polars"],
)
def test_arrays_and_data_frames_go_through_the_same_rules(make):
    table = table_from_arrays(make("-"), np.arange(ROWS) % 2, "data")
    assert table.frame["x1"].dtype.is_numeric()
    assert table.notes == ["column x1: '-' in row 5 is no number and taken as missing"]
    assert prepare(table).notes[1] == table.notes[0]


class Pandas:
    """The part of a pandas data frame that is used: this library does not depend on pandas."""

    def __init__(self, **columns):
        self.columns = list(columns)
        self.values = columns

    def __getitem__(self, name):
        return self.values[name]


def test_another_data_frame_goes_through_the_same_rules():
    frame = Pandas(x1=np.array([*range(20), "-", None, float("nan"), "$5"], dtype=object), x2=np.arange(24) % 5)
    table = table_from_arrays(frame, np.arange(24) % 2, "data")
    assert table.frame["x1"].to_list() == [*range(20), None, None, None, 5]
    assert len(table.notes) == 2


def test_objects_in_a_polars_frame_go_through_the_same_rules():
    frame = pl.DataFrame({"x1": pl.Series([*range(20), "-", 5.5], dtype=pl.Object)})
    table = table_from_arrays(frame, np.arange(22) % 2, "data")
    assert table.frame["x1"].to_list() == [*range(20), None, 5.5]


def test_a_number_that_the_user_calls_missing_is_missing_whatever_the_column_holds():
    frame = pl.DataFrame({"number": [1.5, -999.0, 2.5], "text": ["1.5", "-999.0", "2.5"]})
    read = table_from_arrays(frame, [0, 1, 0], "data", Reading(missing=["-999"])).frame
    assert read["number"].to_list() == read["text"].to_list() == [1.5, None, 2.5]


def test_missing_objects_are_no_texts():
    values = np.array([[None, "Rome"], [float("nan"), "Oslo"], ["7", None]], dtype=object)
    frame = table_from_arrays(values, [0, 1, 0], "data").frame
    assert frame["x1"].to_list() == [None, None, 7]
    assert frame["x2"].to_list() == ["Rome", "Oslo", None]


@pytest.mark.parametrize("call", ["numeric", "categorical"])
def test_a_slip_in_the_name_of_a_column_gets_a_suggestion(call):
    table = table_from_arrays(pl.DataFrame({"Rooms": [1, 2] * 10}), [0, 1] * 10, "data")
    with pytest.raises(DataError, match=r"got 'rooms'; did you mean 'Rooms'\?"):
        prepare(table, **{call: ["rooms"]})


def test_a_slip_in_the_target_gets_a_suggestion(tmp_path):
    with pytest.raises(DataError, match=r"got 'survived', the columns are Age, Survived; did you mean 'Survived'\?"):
        read(tmp_path, "Age,Survived\n5,1\n", target="survived")


def test_plain_columns_do_not_depend_on_a_comma_elsewhere_unless_ambiguous():
    frame = pl.DataFrame(
        {"whole": ["1", "2"], "part": ["0.5", "1.25"], "either": ["1.234", "5.5"], "text": ["1,5", "x"]}
    )
    columns, marks = plain_columns(frame, Reading(), semicolons=False)
    assert list(columns) == ["whole", "part"]
    assert marks["part"].point == 2
    assert list(plain_columns(frame.drop("text"), Reading(), semicolons=False)[0]) == ["whole", "part", "either"]
