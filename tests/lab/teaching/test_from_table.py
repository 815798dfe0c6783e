"""The rows, features and target that ``batchnorm explain DATA`` takes from a table."""

import json

import numpy as np
import polars as pl
import pytest

from batchnorm.errors import DataError
from batchnorm.lab.data.sources import BUILT_IN_NAMES
from batchnorm.lab.data.tables import Table, read_table
from batchnorm.lab.teaching.from_table import from_table
from batchnorm.lab.teaching.worked_example import worked_example
from support import run_command

RNG = np.random.default_rng(0)
NOISE, OTHER = RNG.normal(size=(2, 60)).round(2)
INDEX = np.arange(60)


def batch_of(target, **columns):
    return from_table(Table("table", pl.DataFrame(columns), target))


@pytest.mark.parametrize("name", BUILT_IN_NAMES)
def test_the_features_and_the_target_of_a_built_in_data_set_vary_in_the_rows(name):
    batch = from_table(read_table(name))
    assert (np.ptp(batch.features, axis=0) > 0).all()
    assert 0 <= min(batch.target) < max(batch.target) <= 1


def test_the_two_columns_that_tell_most_about_a_number_are_taken_in_the_order_of_the_table():
    price = 1000 * (3 * NOISE + OTHER) + 50_000
    batch = batch_of("price", bad=RNG.normal(size=60), size=OTHER, worse=RNG.normal(size=60), rooms=NOISE, price=price)
    assert batch.names == ("size", "rooms")
    assert batch.remarks[0] == "Of 4 columns, size and rooms tell most about price."


def test_the_columns_that_tell_classes_apart_are_taken_whatever_the_order_of_the_classes():
    kind = np.array(["b", "c", "a"])[INDEX % 3]
    batch = batch_of("kind", noise=NOISE, hump=(kind == "a") + 0.1 * OTHER, step=(kind == "b") + 0.1 * NOISE, kind=kind)
    assert batch.names == ("hump", "step")


def test_a_price_is_scaled_so_that_one_step_changes_gamma_a_little():
    batch = batch_of("price", size=NOISE, rooms=OTHER, price=300_000 + 50_000 * NOISE)
    assert (min(batch.target), max(batch.target)) == (0, 1)
    example = worked_example(batch)
    assert all(abs(layer.step.gamma.new - 1) < 0.5 for layer in (example.before, example.after))
    low, high = sorted(300_000 + 50_000 * NOISE[:4])[::3]
    assert (
        f"price is scaled to 0 to 1 over these rows, and rounded: (price - {low:.7g}) / {high - low:.7g}."
        in " ".join(str(example).split())
    )


@pytest.mark.parametrize(
    ("labels", "target", "remark"),
    [
        (["no", "yes", "yes", "no"], [0, 1, 1, 0], "y: 1 stands for yes, and 0 for no."),
        (["cat", "dog", "eel", "cat"], [1, 0, 0, 1], "y: 1 stands for cat, and 0 for each of the 2 other classes."),
        ([2, 1, 1, 2], [1, 0, 0, 1], "y: 1 stands for 2, and 0 for 1."),
        ([7, 5, 9, 7], [1, 0, 0, 1], "y: 1 stands for 7, and 0 for each of the 2 other classes."),
        (["yes"] * 4, [1, 1, 1, 1], "y: 1 stands for yes."),
        ([True, False, False, True], [1, 0, 0, 1], None),
        ([0, 1, 0, 1], [0, 1, 0, 1], None),
        ([0.2, 0.9, 0.5, 0.7], [0.2, 0.9, 0.5, 0.7], None),
    ],
)
def test_a_class_becomes_1_and_the_others_0(labels, target, remark):
    batch = batch_of("y", a=[1.5, 2.0, 0.5, 1.0], b=[3, 1, 2, 2], y=labels)
    assert batch.target == target
    assert [text for text in batch.remarks if text.startswith("y")] == [remark] * bool(remark)


def test_a_table_sorted_by_class_gives_rows_of_two_classes():
    batch = batch_of("y", a=NOISE, b=OTHER, y=np.repeat(["old", "new"], 30))
    assert batch.target == [1, 1, 1, 0]
    assert "The mini-batch is rows 1, 2, 3 and 31 of table, which has 60." in batch.remarks


def test_a_column_that_starts_with_one_value_gives_a_row_with_another():
    batch = batch_of("y", zeros=np.where(INDEX < 40, 0, INDEX), b=OTHER, y=INDEX % 2)
    assert [row[0] for row in batch.features] == [0, 0, 0, 41]  # where the target differs too


def test_dates_count_days_and_booleans_are_numbers():
    days = pl.datetime_range(pl.datetime(2024, 1, 3), pl.datetime(2024, 1, 6), "1d", eager=True).reverse()
    batch = batch_of("y", sold=days, new=[True, False, True, True], y=[0, 1, 1, 0])
    assert batch.features == [(3, 1), (2, 0), (1, 1), (0, 1)]
    assert "sold counts days from 2024-01-03 00:00:00." in batch.remarks
    assert "took is in days." in batch_of("y", took=days - days[0], a=NOISE[:4], y=[0, 1, 1, 0]).remarks
    assert batch_of("y", a=NOISE[:4], b=OTHER[:4], y=days.dt.date()).target == [1, 0.667, 0.333, 0]


def test_rows_with_missing_cells_are_passed_over():
    a, b = [None, 1.0, 2.0, np.nan, 4.0, 6.0, 5.0], [1, 0, 3, 4, None, 3, 7]
    batch = batch_of("y", a=a, b=b, y=[0, 1, 0, 1, 1, None, 1])
    assert batch.features == [(1, 0), (2, 3), (5, 7)]


@pytest.mark.parametrize(
    ("columns", "got"),
    [
        ({"x": NOISE}, "got x"),
        ({"x": NOISE, "city": ["a", "b"] * 30}, "got x"),
        ({"x": NOISE, "one": [5] * 60}, "got x; one has one value"),
        ({"x": NOISE, "No": INDEX}, "got x; No counts the rows"),
        ({"x": NOISE, "void": [None, np.nan] * 30}, "got x; void has no values"),
        ({"one": [5] * 60}, "got none; one has one value"),
    ],
)
def test_fewer_than_two_columns_that_vary_are_refused_with_the_reason(columns, got):
    with pytest.raises(DataError, match=f"must have 2 columns of numbers besides the target; {got}$"):
        batch_of("y", **columns, y=INDEX % 2)


def test_a_target_of_one_value_or_of_many_texts_is_explained_all_the_same():
    assert batch_of("y", a=NOISE, b=OTHER, y=[250_000] * 60).target == [1, 1, 1, 1]
    assert batch_of("y", a=NOISE, b=OTHER, y=[f"name {i}" for i in INDEX]).target == [1, 0, 0, 0]


@pytest.mark.parametrize("y", [[[1], [2], [3], [4]], [None] * 4, pl.Series([None] * 4, dtype=pl.Date)])
def test_a_target_that_can_not_be_one_is_refused(y):
    with pytest.raises(DataError, match="target must"):
        batch_of("y", a=NOISE[:4], b=OTHER[:4], y=y)


def test_the_command_says_where_the_numbers_come_from(tmp_path):
    frame = pl.DataFrame({"a": NOISE, "b": OTHER, "c": NOISE + OTHER, "kind": ["x", "y"] * 30})
    frame.write_csv(tmp_path / "own.csv")
    text = run_command("explain", "own.csv", "--target", "kind", cwd=tmp_path).stdout
    assert "No target was given" not in text
    assert max(map(len, text.splitlines())) <= 80
    figures = json.loads(run_command("explain", "own.csv", "--target", "kind", "--json", cwd=tmp_path).stdout)
    assert all(remark in " ".join(text.split()) for remark in figures["remarks"])
    run_command("explain", "own.csv", "--target", "kind", "--html", "own.html", cwd=tmp_path)
    assert all(remark in (tmp_path / "own.html").read_text() for remark in figures["remarks"])
