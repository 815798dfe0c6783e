"""docs/accuracy.md shows the committed measurement, and the measurement keeps what the page promises."""

from batchnorm.lab.bench.markdown import replace_table
from support import ROOT, benchmark_results, benchmark_script

PAGE = (ROOT / "docs/accuracy.md").read_text()
CONTENT = benchmark_results("accuracy")


def test_the_table_of_the_page_is_that_of_the_committed_file():
    assert replace_table(PAGE, "table", benchmark_script("accuracy").table(CONTENT)) == PAGE


def test_the_committed_errors_are_within_what_is_promised():
    for row in CONTENT["errors"]:
        limit = 0 if row["case"].startswith("constant") else 1e-5
        assert row["native"] <= limit, row
        # The reference's factors are floats: 1e40, that of subnormal values, is none.
        assert row["case"].startswith("subnormal") or row["reference"] <= limit, row


def test_the_page_says_how_many_seeds_and_what_shape_were_measured():
    text = " ".join(PAGE.split())
    assert f"{CONTENT['seeds']} seeds" in text
    assert str(tuple(CONTENT["shape"])) in text


def test_measuring_anew_keeps_the_promise():
    for row in benchmark_script("accuracy").measure()["errors"]:
        assert row["native"] <= (0 if row["case"].startswith("constant") else 1e-5), row
