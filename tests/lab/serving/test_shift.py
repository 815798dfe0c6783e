"""The test for a shift of the rows that a trained model is given, and the remedies."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import DataError, InputError
from batchnorm.lab.serving.served import Served
from batchnorm.lab.serving.shift import TableRows, examine, read_rows

LIMITS = {"prior": 16, "alpha": 0.05, "reference_samples": 256}


def rows_of_two_classes(count, seed, shift=0.0):
    generator = np.random.default_rng(seed)
    target = generator.integers(0, 2, count)
    return TableRows(generator.normal(size=(count, 4)) + 1.5 * target[:, None] + shift, target)


@pytest.fixture(scope="module")
def served():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), bn.BatchNorm1d(8, activation="relu"), nn.Linear(8, 2)).double()
    known = rows_of_two_classes(600, 0)
    x, y = torch.tensor(known.features), torch.tensor(known.target)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return Served(model.eval(), torch.as_tensor, None)


@pytest.fixture(scope="module")
def estimator():
    known = rows_of_two_classes(600, 0)
    fitted = bn.BatchNormMLPClassifier((8,), batch_size=100, random_state=0, tol=1.0, n_iter_no_change=60)
    fitted.fit(known.features, known.target)
    return Served(fitted.network_.eval(), torch.as_tensor, fitted)


def test_rows_like_those_it_was_trained_on_are_no_shift(served):
    found = examine(served, rows_of_two_classes(300, 1), **LIMITS)
    assert not found.shift.shifted
    assert found.scores.as_is > 0.9
    assert abs(found.scores.adapted - found.scores.as_is) < 0.05
    assert found.scores.retrained is None


def test_shifted_rows_are_noticed_and_adapting_restores_the_score(served):
    before = {name: values.clone() for name, values in served.model.state_dict().items()}
    found = examine(served, rows_of_two_classes(300, 1, shift=4.0), **LIMITS)
    assert found.shift.shifted
    assert found.scores.as_is < 0.6
    assert found.scores.adapted > 0.8  # the prior of 16 leaves a tenth of the shift
    assert (found.scores.rows, found.scores.others) == (150, 150)
    assert all(torch.equal(values, before[name]) for name, values in served.model.state_dict().items())


def test_the_scores_are_of_rows_that_the_remedies_have_not_seen(served):
    """The rows that the remedies get have wrong targets, which would show in the score."""
    from sklearn.model_selection import train_test_split

    rows = rows_of_two_classes(300, 1)
    given, scored = train_test_split(np.arange(300), test_size=0.5, random_state=0)
    target = rows.target.copy()
    target[given] = 1 - target[given]
    assert examine(served, TableRows(rows.features, target), **LIMITS).scores.as_is > 0.9
    target = rows.target.copy()
    target[scored] = 1 - target[scored]
    assert examine(served, TableRows(rows.features, target), **LIMITS).scores.as_is < 0.1


def test_an_estimator_is_retrained_too(estimator):
    shifted = rows_of_two_classes(300, 1, shift=4.0)
    found = examine(estimator, shifted, **LIMITS)
    assert found.scores.as_is < 0.6
    assert min(found.scores.adapted, found.scores.retrained) > 0.75
    said = str(found).splitlines()
    assert said[-4:-2] == ["Score on 150 rows:", f"as is      {found.scores.as_is:.3f}"]
    assert said[-1] == f"retrained  {found.scores.retrained:.3f}  on the same other rows, with labels"
    assert max(map(len, said)) <= 80


def test_without_a_target_there_is_no_score(served):
    found = examine(served, TableRows(rows_of_two_classes(300, 1).features, None), **LIMITS)
    assert found.scores is None
    assert str(found) == str(found.shift)
    assert found.frame()["path"].to_list() == ["1"]
    assert repr(found).startswith("ShiftReport(")
    assert json.loads(found.to_json())["scores"] is None


def test_rows_are_compared_with_reference_rows(served):
    found = examine(served, rows_of_two_classes(300, 1, shift=4.0), rows_of_two_classes(200, 2), **LIMITS)
    assert (found.shift.against, found.shift.reference_samples, found.shift.shifted) == ("reference", 200, True)
    content = json.loads(found.to_json())
    assert content["shift"]["shifted"] is True
    assert content["shift"]["layers"][0]["path"] == "1"


def test_a_score_needs_an_output_per_class():
    model = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3), nn.Linear(3, 1)).double().eval()
    with pytest.raises(InputError, match=r"one output per class, \(N, classes\); got \(150, 1\). Without a target"):
        examine(Served(model, torch.as_tensor, None), rows_of_two_classes(300, 1), **LIMITS)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "rows.csv"
    pl.DataFrame(
        {"a": [1, 2, 3], "b": [0.5, 1.5, 2.5], "c": ["x", "y", "z"], "d": [1, None, 3], "y": [0, 1, 0]}
    ).write_csv(path)
    return str(path)


def test_features_are_the_columns_named_in_their_order_and_never_the_target(table):
    rows = read_rows(table, None, ["b", "a"])
    assert rows.features.tolist() == [[0.5, 1], [1.5, 2], [2.5, 3]]
    assert rows.target.tolist() == [0, 1, 0]  # the column called y
    digits = read_rows("digits", None, [])
    assert digits.features.shape == (1797, 64)
    assert sorted(set(digits.target)) == list(range(10))


@pytest.mark.parametrize(
    ("target", "columns", "said"),
    [
        (None, [], "a feature must be a column of numbers; 'c' is String: pass columns=NAMES for others"),
        (None, ["a", "d"], "a feature must have no empty cell; 'd' has 1"),
        (None, ["a", "e"], "^columns must be columns of the data; got 'e'"),
        ("e", ["a"], "^target must be a column of the data; got 'e'"),
        ("d", ["a"], "the target must have no empty cell; 'd' has 1"),
    ],
)
def test_a_table_that_can_not_be_used_is_refused_by_the_name_of_its_column(table, target, columns, said):
    with pytest.raises(DataError, match=said):
        read_rows(table, target, columns)
