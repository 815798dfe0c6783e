"""bn.lab.compare and bn.lab.study, and the report that they return."""

import json
import math

import numpy as np
import polars as pl
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes

import batchnorm as bn
from batchnorm.lab.claims import CLAIMS

QUICK = {"hidden": (6,), "steps": 24, "search_seeds": 1, "seeds": 5, "learning_rates": (0.1, 1.0), "batch_size": 30}


@pytest.fixture(scope="module")
def studied():
    bunch = load_breast_cancer(as_frame=False)
    frame = pl.DataFrame(bunch.data, schema=[str(name) for name in bunch.feature_names])
    return bn.lab.study(frame, bunch.target, name="<b>tumours</b>", **QUICK, jobs=1)


def test_the_frame_has_a_row_per_arm_with_the_numbers_of_the_result(studied):
    table = studied.frame()
    arms = studied.result.arms
    assert table["batch_norm"].to_list() == list(arms)
    assert table["test_score"].to_list() == [values.test_score for values in arms.values()]
    assert table["step_ratio_at_least"].to_list()[1:] == [ratio.median[0] for ratio in studied.result.ratios.values()]


def test_the_verdicts_have_a_row_per_finding(studied):
    verdicts = studied.verdicts()
    findings = [finding for claim in studied.judgment.claims for finding in claim.findings]
    assert verdicts["claim"].unique(maintain_order=True).to_list() == list(CLAIMS)
    assert verdicts["verdict"].to_list() == [finding.verdict for finding in findings]


def test_the_report_is_written_to_a_path_whole_or_not_at_all(studied, tmp_path):
    page = studied.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == page
    assert "&lt;b&gt;tumours&lt;/b&gt;" in page
    assert "<b>tumours" not in page
    with pytest.raises(bn.RunError, match="must be writable"):
        studied.to_html(tmp_path / "missing" / "page.html")


def test_a_notebook_shows_the_verdict_and_the_tables_escaped(studied):
    shown = studied._repr_html_()
    assert shown.count("<tr>") == 2 + 3 + 9
    assert "<b>tumours" not in shown
    assert "script" not in shown


def test_each_figure_has_a_page_and_a_frame_of_its_numbers(studied):
    figures = studied.figures
    assert "race" in figures
    for figure in figures.values():
        assert figure.frame().height > 0
    shown = figures["race"]._repr_html_()
    assert shown.startswith("<iframe")
    assert "Plotly" in shown
    assert '<figure id="figure-race"' in figures["race"].to_html()


def test_run_json_in_a_given_folder_is_that_of_the_command_line(tmp_path):
    x, y = load_diabetes(return_X_y=True)
    found = bn.lab.compare(x, y, **QUICK, jobs=1, out=tmp_path / "kept")
    content = json.loads((tmp_path / "kept" / "run.json").read_text())
    assert content["status"] == "complete"
    assert content["data"]["features"] == [f"x{i}" for i in range(1, 11)]
    assert content["command"].startswith("bn.lab.compare(X, y, hidden=(6,)")
    assert found.verdicts().is_empty()
    assert "claims" not in content["result"]


def test_the_call_in_a_report_has_the_options_that_say_how_the_data_is_read(tmp_path):
    x, y = load_diabetes(return_X_y=True)
    options = {"name": "sugar", "task": "regression", "numeric": ["x1"], "categorical": ["x2"], "missing": ["-1"]}
    bn.lab.compare(x, y, **options, dates="day-first", **QUICK, jobs=1, out=tmp_path / "kept")
    call = json.loads((tmp_path / "kept" / "run.json").read_text())["command"]
    for option, value in {**options, "dates": "day-first"}.items():
        assert f"{option}={value!r}" in call


class Frame:
    """A data frame as pandas has them: columns, and each by its name."""

    def __init__(self, **columns):
        self._columns = columns
        self.columns = list(columns)

    def __getitem__(self, name):
        return np.array(self._columns[name], dtype=object)


def test_a_data_frame_of_another_library_works_with_texts_gaps_and_a_named_target():
    generator = np.random.default_rng(0)
    frame = Frame(
        amount=[None if i == 3 else float(v) for i, v in enumerate(generator.normal(size=60))],
        color=generator.choice(["red", "blue"], 60).tolist(),
        answer=generator.choice(["yes", "no"], 60).tolist(),
    )
    found = bn.lab.compare(frame, "answer", **QUICK, jobs=1)
    data = json.loads((found.folder / "run.json").read_text())["data"]
    assert data["features"] == ["amount", "color=blue", "color=red"]
    assert data["classes"] == ["no", "yes"]
    assert "1 missing numbers" in " ".join(data["notes"])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((np.zeros(5), np.zeros(5)), {}, bn.DataError, "X must have 2 dimensions, rows and columns; got 1"),
        ((np.zeros((5, 2)), np.zeros((5, 2))), {}, bn.DataError, "y must have 1 dimension; got 2"),
        ((np.zeros((5, 2)), np.zeros(4)), {}, bn.DataError, "one value for each of the 5 rows of X; got 4"),
        ((np.zeros((5, 2)), "z"), {}, bn.DataError, "X has no column 'z'"),
        ((pl.DataFrame({"y": [1.0]}), [1.0]), {}, bn.DataError, "both are named 'y'"),
        ((np.zeros((5, 2)), np.zeros(5)), {"step": 3}, bn.InputError, "a setting must be one of .*; got 'step'"),
        ((np.zeros((5, 2)), np.zeros(5)), {"claims": ["speed"]}, bn.InputError, "some of fewer_steps.*; got 'speed'"),
        ((np.zeros((5, 2)), np.zeros(5)), {"steps": 0}, bn.InputError, "steps must be at least 1; got 0"),
    ],
)
def test_bad_input_names_the_rule_and_the_value(arguments, options, error, words):
    with pytest.raises(error, match=words):
        bn.lab.compare(*arguments, **options)


def test_a_study_accepts_no_choice_of_claims():
    with pytest.raises(bn.InputError, match="study measures every claim"):
        bn.lab.study(np.zeros((5, 2)), np.zeros(5), claims=["shift"])


def test_an_unknown_number_is_null_and_not_nan(studied):
    for column in studied.frame().select(pl.selectors.float()).iter_columns():
        assert not any(value is not None and math.isnan(value) for value in column)


def test_the_notes_on_the_data_are_part_of_the_report():
    values = np.random.default_rng(0).normal(size=(40, 2)).astype(object)
    values[4, 0] = "-"
    values[5, 0] = "ganz"
    found = bn.lab.compare(values, np.arange(40) % 2, missing="ganz", **QUICK, jobs=1)
    notes = [
        "classification: y has 2 values",
        "column x1: 'ganz' in row 6 is taken as missing",
        "column x1: '-' in row 5 is no number and taken as missing",
        "2 missing numbers are filled with the median of their column in the training rows",
        "the batch size of 30 is reduced to the 24 training rows",
    ]
    assert found.result.notes == notes
    assert found.to_dict()["notes"] == notes
    assert "5 notes" in repr(found)
    assert f"- {notes[1]}" in str(found)
    assert "is no number and taken as missing" in found._repr_html_()
    assert "is no number and taken as missing" in found.to_html()
