"""Dataclasses to JSON and back."""

import json
import math
from dataclasses import dataclass, field
from typing import Literal

import pytest

from batchnorm.lab.json_records import from_json, to_json


@dataclass(frozen=True)
class Leaf:
    name: str
    value: float
    maybe: float | None = None


@dataclass(frozen=True)
class Tree:
    kind: Literal["small", "large"]
    leaf: Leaf
    pairs: list[tuple[float, float]]
    by_name: dict[str, list[Leaf]]
    counts: tuple[int, ...] = (1, 2)
    rest: list[int | None] = field(default_factory=list)


TREE = Tree("small", Leaf("a", 0.5), [(0.0, math.inf)], {"b": [Leaf("c", -math.inf, 1.0)]}, (3,), [None, 4])


def test_a_record_is_read_as_it_was_written():
    text = json.dumps(to_json(TREE), allow_nan=False)
    assert from_json(Tree, json.loads(text)) == TREE


def test_nan_is_written_as_null_and_read_as_nan_where_a_number_must_be():
    values = to_json(Leaf("a", math.nan))
    assert values == {"name": "a", "value": None, "maybe": None}
    read = from_json(Leaf, values)
    assert math.isnan(read.value)
    assert read.maybe is None


def test_a_whole_number_stays_one_so_that_it_is_written_as_it_was():
    assert to_json(from_json(Leaf, {"name": "a", "value": 1}))["value"] == 1
    assert isinstance(from_json(Leaf, {"name": "a", "value": 1}).value, int)


def test_numbers_that_json_lacks_are_kept_as_null_and_text():
    assert to_json({"a": [math.nan, math.inf, (-math.inf, 1.5)]}) == {"a": [None, "inf", ["-inf", 1.5]]}


def test_a_missing_field_takes_its_default():
    values = to_json(TREE)
    del values["counts"], values["rest"]
    read = from_json(Tree, values)
    assert (read.counts, read.rest) == ((1, 2), [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "huge"}, "one of 'small', 'large'; got 'huge'"),
        ({"leaf": 3}, "of type dict; got 3"),
        ({"leaf": {"name": 3, "value": 0.5}}, "of type str; got 3"),
        ({"leaf": {"name": "a", "value": "much"}}, "one of None, 'inf', '-inf'; got 'much'"),
        ({"leaf": {"name": "a", "value": [1.0]}}, "must be a number"),
        ({"leaf": {"name": "a", "value": 1.0, "color": "red"}}, "Leaf must have fields of name, value, maybe; got 'c"),
        ({"pairs": [[1.0]]}, "argument"),
    ],
)
def test_a_value_that_does_not_fit_its_type_is_refused(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        from_json(Tree, to_json(TREE) | changes)
