"""Data sets made from tables: columns, missing values, the split."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.errors import DataError
from batchnorm.lab.data.columns import LeftOut
from batchnorm.lab.data.dataset import prepare, split
from batchnorm.lab.data.tables import Table, read_table

ROWS = 60
RANDOM = np.random.default_rng(0)


def columns(**changes):
    plain = {
        "size": RANDOM.normal(50, 9, ROWS),
        "rooms": RANDOM.integers(1, 6, ROWS),
        "city": RANDOM.choice(["Rome", "Oslo", "Lima"], ROWS),
        "y": RANDOM.integers(0, 2, ROWS),
    }
    return pl.DataFrame({**plain, **changes}, strict=False)


def dataset(target="y", /, *, options=None, **changes):
    return prepare(Table("homes", columns(**changes), target), **(options or {}))


def test_numbers_are_standardized_on_the_training_rows_and_categories_one_hot():
    data = dataset()
    assert data.features == ["size", "rooms", "city=Lima", "city=Oslo", "city=Rome"]
    x, _ = data.part("train", standardized=True)
    np.testing.assert_allclose(x[:, :2].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(x[:, :2].std(0), 1, atol=1e-6)
    assert set(np.unique(x[:, 2:])) == {0.0, 1.0}
    assert (x[:, 2:].sum(1) == 1).all()
    raw, _ = data.part("train", standardized=False)
    assert raw[:, 0].mean() > 40


def test_the_validation_and_test_rows_have_no_part_in_the_scaling():
    frame = columns()
    plain = prepare(Table("homes", frame, "y"))
    others = np.concatenate([plain.parts["validation"], plain.parts["test"]])
    size = frame["size"].to_numpy().copy()
    size[others] += 1e6
    moved = prepare(Table("homes", frame.with_columns(size=pl.Series(size)), "y"))
    assert np.array_equal(plain.center, moved.center)
    assert np.array_equal(plain.scale, moved.scale)


def test_missing_numbers_take_the_training_median_and_missing_texts_are_a_category():
    size = [None if i % 7 == 0 else float(i) for i in range(ROWS)]
    city = [None if i % 5 == 0 else "Rome" for i in range(ROWS)]
    data = dataset(size=size, city=city)
    train = data.parts["train"]
    known = [size[i] for i in train if size[i] is not None]
    assert data.x[0, 0] == np.median(known)
    assert "city=(missing)" in data.features
    assert any("missing numbers are filled with the median" in note for note in data.notes)


def test_numbers_far_from_0_are_standardized_before_they_are_rounded():
    seconds = 1.7e9 + RANDOM.normal(0, 30, ROWS)
    data = dataset(size=seconds)
    x, _ = data.part("train", standardized=True)
    assert x.dtype == np.float32
    assert len(np.unique(x[:, 0])) == len(x)
    assert abs(x[:, 0].mean()) < 1e-5
    assert x[:, 0].std() == pytest.approx(1, abs=1e-5)


def test_a_column_that_is_constant_in_training_is_not_divided_by_rounding_noise():
    size = np.full(ROWS, 0.1)
    y = columns()["y"]
    plain = prepare(Table("homes", columns(y=y), "y"))
    size[plain.parts["validation"][0]] = 5.0
    data = prepare(Table("homes", columns(y=y, size=size), "y"))
    x, _ = data.part("validation", standardized=True)
    assert x[:, 0].max() == pytest.approx(4.9)


def test_lists_are_left_out():
    data = dataset(extra=[[1, 2]] * ROWS)
    assert data.left_out == [LeftOut("extra", "it holds List(Int64)")]


def test_texts_that_are_nearly_all_numbers_are_reported_as_such():
    data = dataset(extra=[*(str(i / 7) for i in range(ROWS - 1)), "oops"])
    assert data.left_out == [LeftOut("extra", "its texts differ and are not all numbers, such as 'oops'")]


def test_infinite_numbers_count_as_missing():
    data = dataset(size=[np.inf if i == 3 else float(i) for i in range(ROWS)])
    assert np.isfinite(data.x).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"extra": list(range(ROWS))}, "counts the rows"),
        ({"extra": list(range(100, 100 + ROWS))}, "counts the rows"),
        ({"extra": [f"id-{i}" for i in range(ROWS)]}, "all its texts differ"),
        ({"extra": [3.0] * ROWS}, "one value"),
        ({"extra": ["x"] * ROWS}, "one value"),
        ({"extra": [None] * ROWS}, "no values"),
    ],
)
def test_columns_without_information_are_left_out_with_the_reason(change, reason):
    data = dataset(**change)
    assert [out.column for out in data.left_out] == ["extra"]
    assert reason in data.left_out[0].reason
    assert not any("extra" in feature for feature in data.features)


def test_a_column_asked_for_by_name_is_kept():
    data = dataset(options={"numeric": ["extra"]}, extra=list(range(ROWS)))
    assert "extra" in data.features
    data = dataset(options={"categorical": ["rooms"]})
    assert "rooms=1" in data.features


def test_rare_categories_are_taken_together():
    data = dataset(city=[f"c{i % 25:02}" for i in range(ROWS)])
    cities = [feature for feature in data.features if feature.startswith("city=")]
    assert len(cities) == 21
    assert "city=(other)" in cities


def test_dates_and_booleans_are_used():
    import datetime

    days = [datetime.date(2020, 1, 1) + datetime.timedelta(days=int(d)) for d in RANDOM.integers(0, 900, ROWS)]
    data = dataset(day=days, flag=[i % 3 == 0 for i in range(ROWS)])
    assert "day" in data.features
    assert "flag=true" in data.features


@pytest.mark.parametrize(
    ("values", "task", "classes"),
    [
        ([i % 3 for i in range(ROWS)], "classification", ["0", "1", "2"]),
        (["no", "yes"] * (ROWS // 2), "classification", ["no", "yes"]),
        ([True, False] * (ROWS // 2), "classification", ["false", "true"]),
        ([float(i % 2) for i in range(ROWS)], "classification", ["0.0", "1.0"]),
        ([i / 7 for i in range(ROWS)], "regression", []),
        (list(range(ROWS)), "regression", []),
    ],
)
def test_the_task_is_inferred_and_said(values, task, classes):
    data = dataset(y=values)
    assert data.task == task
    assert data.classes == classes
    assert data.notes[0].startswith(task)


def test_the_task_can_be_asked_for():
    assert dataset(options={"task": "regression"}).task == "regression"


def test_a_regression_target_is_standardised_on_the_training_rows():
    data = dataset(y=RANDOM.normal(1000, 50, ROWS))
    _, y = data.part("train", standardized=True)
    assert abs(y.mean()) < 1e-6
    assert y.std() == pytest.approx(1, abs=1e-6)


def test_rows_without_a_target_are_not_used():
    data = dataset(y=[None if i < 10 else i % 2 for i in range(ROWS)])
    assert sum(len(rows) for rows in data.parts.values()) == ROWS - 10
    assert any("10 rows without a value of y" in note for note in data.notes)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"y": ["a", "b"] * 29 + ["-"] * 2}, {}, "for a missing value; 'y' has '-' in row 59 and 1 other cell"),
        ({"y": [1] * ROWS}, {}, "at least 2 classes; 'y' has 1: 1"),
        ({"y": [2] + [0, 1] * 29 + [0]}, {}, "at least 2 rows; in 'y' 2 has 1"),
        ({"y": [None] * ROWS}, {}, "all of 'y' are missing"),
        ({"y": [0, 1] * 4 + [None] * 52}, {}, "at least 10 rows with a target; got 8"),
        ({"y": ["a", "b"] * 30}, {"task": "regression"}, "'y' must hold numbers; it holds 'a'"),
        ({}, {"numeric": ["city"]}, "'city' must hold numbers; it holds '(Rome|Oslo|Lima)'"),
        ({}, {"numeric": ["price"]}, "numeric must name columns other than the target; got 'price'"),
        ({"size": [1e300 * (i % 7) for i in range(ROWS)]}, {}, "fit a float32; .* column 'size'"),
        ({"y": [[1], [2]] * 30}, {}, "numbers, texts or dates; 'y' holds List"),
        ({"y": [5.0] * ROWS}, {"task": "regression"}, "must vary; 'y' has one value"),
        ({"size": [None] * ROWS, "rooms": [1] * ROWS, "city": ["x"] * ROWS}, {}, "usable column .*size: it has no val"),
    ],
)
def test_unusable_data_are_refused_with_the_reason(changes, options, message):
    with pytest.raises(DataError, match=message) as error:
        dataset(options=options, **changes)
    assert "\n" not in str(error.value)


def test_numbers_that_all_differ_can_be_taken_as_categories():
    data = dataset(options={"categorical": ["extra"]}, extra=list(range(ROWS)))
    assert sum(name.startswith("extra=") for name in data.features) == 21  # the 20 most frequent, and the others


def test_a_table_with_the_target_alone_is_refused():
    with pytest.raises(DataError, match="usable column besides the target; got none"):
        prepare(Table("t", columns().select("y"), "y"))


@given(st.lists(st.integers(0, 4), min_size=10, max_size=200), st.integers(0, 5))
def test_the_split_is_60_20_20_and_any_class_of_two_rows_is_trained_on(classes, seed):
    classes = np.array(classes)
    parts = split(len(classes), classes, seed)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(classes)))
    assert abs(len(parts["train"]) - 0.6 * len(classes)) < 1
    assert abs(len(parts["validation"]) - 0.2 * len(classes)) < 1
    for value, count in zip(*np.unique(classes, return_counts=True), strict=True):
        share = (classes[parts["train"]] == value).sum()
        assert share >= count // 2
        assert abs(share - 0.6 * count) <= 1.2


def test_large_data_are_validated_on_5000_rows():
    data = prepare(read_table("placement", rows=30_000))
    assert len(data.parts["validation"]) == 5000
    assert any("5000 of 6000 validation rows" in note for note in data.notes)


def test_the_fingerprint_changes_with_the_data():
    frame = columns()
    one = prepare(Table("homes", frame, "y"))
    other = prepare(Table("homes", frame.with_columns(size=pl.col("size") * 1.001), "y"))
    assert one.fingerprint == prepare(Table("homes", frame, "y")).fingerprint
    assert one.fingerprint != other.fingerprint
