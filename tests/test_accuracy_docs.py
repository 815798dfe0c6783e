"""docs/accuracy.md shows the committed measurement, and the measurement keeps what the page promises."""

import importlib.util
import json
from pathlib import Path

import pytest

from batchnorm.lab.bench.markdown import replace_table

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/accuracy.md").read_text()


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("accuracy", ROOT / "benchmarks/accuracy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def content():
    return json.loads((ROOT / "benchmarks/results/accuracy.json").read_text())


def test_the_table_of_the_page_is_that_of_the_committed_file(script, content):
    assert replace_table(PAGE, "table", script.table(content)) == PAGE


def test_the_committed_errors_are_within_what_is_promised(content):
    for row in content["errors"]:
        limit = 0 if row["case"].startswith("constant") else 1e-5
        assert row["native"] <= limit, row
        # The reference's factors are floats: 1e40, that of subnormal values, is none.
        assert row["case"].startswith("subnormal") or row["reference"] <= limit, row


def test_the_page_says_how_many_seeds_and_what_shape_were_measured(content):
    assert f"{content['seeds']} seeds" in PAGE
    assert str(tuple(content["shape"])) in PAGE


def test_measuring_anew_keeps_the_promise(script):
    for row in script.measure()["errors"]:
        assert row["native"] <= (0 if row["case"].startswith("constant") else 1e-5), row
