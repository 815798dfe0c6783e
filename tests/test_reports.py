"""The protocol that every report keeps: table, short repr, plain values, data frame, HTML."""

import json
import math
import sys
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import torch

import batchnorm as bn
from batchnorm.errors import MissingDependencyError
from batchnorm.lab.comparison.run_file import read_run
from batchnorm.lab.report.comparison import Comparison
from batchnorm.reports import Entries, Report, Table, json_safe
from support import ROOT, randn


@dataclass(frozen=True, repr=False)
class Sample(Report):
    """A report with all kinds of blocks."""

    paths: tuple[str, ...] = ("a<b", "c" * 90)
    drift: float = math.inf
    _private: object = None

    def _blocks(self):
        yield Table(["layer", "drift"], [self.paths, ["1", "2"]])
        yield ""
        yield Entries([("System", "word " * 30)])
        yield "word & " * 30

    def _summary(self):
        return f"{len(self.paths)} layers"

    def _records(self):
        return [{"layer": path, "drift": self.drift} for path in self.paths]


def layer_and_batches():
    return bn.BatchNorm1d(3), randn(48, 3).split(12)


REPORTS = {
    "Sample": Sample,
    "Recalibration": lambda: bn.recalibrate(*layer_and_batches()),
    "Adaptation": lambda: bn.adapt(*layer_and_batches()),
    "Shift": lambda: bn.detect_shift(*layer_and_batches()),
    "Surgery": lambda: bn.to_torch(layer_and_batches()[0])[1],
    "Kernels": bn.kernels,
    "Diagnosis": bn.doctor,
    "Comparison": lambda: Comparison.of(read_run(ROOT / "docs/results/digits-study")),
    "Explanation": lambda: bn.explain(bn.BatchNorm1d(3, activation="relu"), randn(5, 3)),
}


@pytest.fixture(params=REPORTS)
def report(request):
    return REPORTS[request.param]()


def test_every_public_report_type_is_tested_here():
    public = {name for name in bn.__all__ if isinstance(kind := getattr(bn, name), type) and issubclass(kind, Report)}
    assert public == REPORTS.keys() - {"Sample", "Comparison"}  # of bn.lab


def test_each_report_is_of_the_type_it_is_tested_as():
    assert all(type(make()).__name__ == name for name, make in REPORTS.items())


def test_str_is_a_table_of_at_most_80_columns(report):
    lines = str(report).splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 80


def test_repr_is_one_short_line_that_begins_with_the_type(report):
    assert "\n" not in repr(report)
    assert len(repr(report)) <= 80
    assert repr(report).startswith(f"{type(report).__name__}(")


def test_to_dict_is_ready_for_json_and_holds_no_private_field(report):
    values = report.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert not any(name.startswith("_") for name in values)


def test_frame_has_rows_and_named_columns(report):
    frame = report.frame()
    assert isinstance(frame, pl.DataFrame)
    assert frame.height > 0
    assert frame.columns


def test_frame_names_the_extra_when_polars_is_missing(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(MissingDependencyError, match=r"frame\(\) needs polars: pip install 'batchnorm\[lab\]'"):
        report.frame()


def test_a_notebook_shows_a_table(report):
    assert report._repr_html_().startswith("<div>")
    assert "<table>" in report._repr_html_()


def test_html_is_escaped_and_leaves_nothing_out():
    html = Sample()._repr_html_()
    assert "<td>a&lt;b</td>" in html
    assert f"<td>{'c' * 90}</td>" in html
    assert "<th>System</th><td>word word" in html
    assert "<p>word &amp; word" in html
    assert "<p></p>" not in html


def test_json_safe_replaces_what_json_lacks():
    values = {
        1: (np.float32(0.5), np.int64(2), np.bool_(True)),
        "tensor": torch.tensor([[1.0, -math.inf]]),
        "array": np.array([math.nan, 2.0]),
        "none": None,
        "sample": Sample(),
        "object": torch.float32,
    }
    assert json_safe(values) == {
        "1": [0.5, 2, True],
        "tensor": [[1.0, None]],
        "array": [None, 2.0],
        "none": None,
        "sample": {"paths": ["a<b", "c" * 90], "drift": None},
        "object": "torch.float32",
    }


def test_the_short_reprs_name_what_matters_most():
    layer, batches = layer_and_batches()
    assert repr(bn.recalibrate(layer, [batch + 1 for batch in batches])).startswith(
        "Recalibration(48 samples, 1 layer, largest drift "
    )
    assert repr(bn.detect_shift(layer, [batch + 9 for batch in batches])) == (
        "Shift(shifted, 48 samples, p at most 0.001)"
    )
    with bn.adapt(layer) as each_batch:
        assert repr(each_batch) == "Adaptation(each batch, prior 16)"
    assert repr(bn.explain(layer, batches[0])) == "Explanation(BatchNorm1d, channels=3, values per channel=12)"


def test_the_frame_of_an_explanation_has_every_number_of_each_value():
    layer, x = bn.BatchNorm1d(2), randn(4, 2, 3)
    explanation = bn.explain(layer, x)
    frame = explanation.frame()
    assert frame.height == x.numel()
    row = frame.row(by_predicate=(pl.col("channel") == 1) & (pl.col("position") == "2,1"), named=True)
    assert row["z"] == x[2, 1, 1].item()
    assert row["mean"] == explanation.training.mean[1].item()
    assert row["output"] == explanation.training.output[2, 1, 1].item()
    assert row["inference_z_hat"] == explanation.inference.z_hat[2, 1, 1].item()
