"""`batchnorm bench` as a user runs it: output, exit status, files."""

import json
import platform
import re
import signal
from pathlib import Path

import pytest
import torch

import batchnorm as bn
from batchnorm.lab.bench import sides
from batchnorm.lab.bench.markdown import fill_page
from batchnorm.lab.bench.registry import CASES, QUICK

FAST = ["--seconds", "0", "--stock-allocator", "--quiet"]
ROOT = Path(__file__).parents[3]
TINY = "(8x16|1x3x5x5)"


class Wrong(bn.BatchNorm1d):
    def forward(self, x, residual=None):
        return super().forward(x, residual) + 1e-3


class Interrupted(bn.BatchNorm1d):
    def forward(self, x, residual=None):
        if self.num_features == 16:
            signal.raise_signal(signal.SIGINT)
        return super().forward(x, residual)


@pytest.fixture(scope="module")
def names():
    return [case.name for case in CASES]


def test_every_case_has_a_name_of_its_own(names):
    assert len(set(names)) == len(names) == 360
    assert "bn+relu/train/float32/64x64x56x56/channels_last" in names
    assert {case.name for case in QUICK} <= set(names)


def test_the_json_on_stdout_is_the_file_and_holds_machine_settings_and_times(bench, tmp_path):
    done = bench("--only", "/(train|eval)/float32/8x16", *FAST, "--json", "--out", "kernels.json")
    content = json.loads(done.stdout)
    assert content == json.loads((tmp_path / "kernels.json").read_text())
    assert content["complete"]
    assert content["settings"]["seconds"] == 0
    assert content["machine"]["torch"] == torch.__version__
    assert content["machine"]["allocator"] == "as it is"
    assert len(content["results"]) == 3 * 2
    for result in content["results"]:
        assert set(result["microseconds"]) == {"ours", "torch", "copy"}
        assert result["microseconds"]["ours"]["low"] <= result["microseconds"]["ours"]["median"]
        assert result["rounds"] >= 5
    assert done.stderr == ""


def test_nothing_in_the_file_names_the_machine_or_its_folders(bench, tmp_path):
    bench("--only", "bn/eval/float32/8x16", *FAST, "--out", "kernels.json")
    machine = json.dumps(json.loads((tmp_path / "kernels.json").read_text())["machine"])
    assert platform.node() not in machine
    assert str(tmp_path.parent) not in machine


def test_the_table_fits_80_columns_and_the_markdown_is_of_the_same_run(bench, tmp_path):
    done = bench("--only", "add.*bfloat16/(8x16|1x3)", *FAST, "--out", "kernels.json")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "bn+add+relu forward" in done.stdout
    table = bench("--table", "kernels.json").stdout
    assert "| 8x16 | contiguous | bfloat16 |  |  | **" in table
    assert "add.*bfloat16/(8x16|1x3)" in table
    page = fill_page("above\n<!-- kernels.json -->\nold\n<!-- end -->\nbelow\n", tmp_path)
    assert page == f"above\n<!-- kernels.json -->\n{table}<!-- end -->\nbelow\n"


def test_the_tables_of_docs_are_those_of_the_committed_results():
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert fill_page(page, ROOT / "benchmarks/results") == page
    assert re.findall(r"<!-- (\w+\.json) -->", page) == ["kernels.json", "allocators.json", "models.json"]


def test_progress_is_on_stderr_alone(bench):
    arguments = ["--only", "bn/eval/float32/8x16", "--seconds", "0", "--stock-allocator"]
    assert bench(*arguments, "--quiet").stderr == ""
    assert bench(*arguments, "--json").stdout.startswith("{")


def test_a_wrong_kernel_is_not_timed_and_the_status_is_1(bench, monkeypatch):
    monkeypatch.setitem(sides.OURS, 2, Wrong)
    done = bench("--only", f"bn/eval/float32/{TINY}", *FAST, "--json", status=1)
    by_shape = {tuple(result["shape"]): result for result in json.loads(done.stdout)["results"]}
    assert by_shape[8, 16]["fault"].startswith("y is 0.001 off, more than rounding explains")
    assert "microseconds" not in by_shape[8, 16]
    assert by_shape[1, 3, 5, 5]["fault"] is None
    shown = bench("--only", "bn/eval/float32/8x16", *FAST, status=1).stdout
    assert "wrong, so not timed: bn/eval/float32/8x16/contiguous: y is" in " ".join(shown.split())


def test_ctrl_c_keeps_what_is_done(bench, monkeypatch, tmp_path):
    monkeypatch.setitem(sides.OURS, 2, Interrupted)
    done = bench("--only", "bn/eval/float32/(32x64|8x16)", *FAST, "--out", "kernels.json", status=130)
    assert done.stderr == "Stopped after 1 of 2 cases, kept in kernels.json.\n"
    content = json.loads((tmp_path / "kernels.json").read_text())
    assert [result["shape"] for result in content["results"]] == [[32, 64]]
    assert not content["complete"]
    assert "Stopped after 1 cases" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--only", "bn+gelu"],
            "--only must match the name of a case, such as bn/train/float32/",
        ),
        (["--only", "(gelu"], "--only must be a text or a regular expression; got '(gelu'"),
        (["--models", "--quick"], "--models can't be combined with other options; got --quick"),
        (["--out", "absent/kernels.json"], "--out must be a file in a folder that exists; got 'absent/kernels.json'"),
        (["--table", "absent.json"], "--table must be a results file of batchnorm bench; 'absent.json'"),
        (["--table", "other.json"], "--table must be a results file of batchnorm bench; 'other.json' is another file"),
        (["--seconds", "-1"], "--seconds must be at least 0; got -1.0"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(bench, tmp_path, arguments, sentence):
    (tmp_path / "other.json").write_text("{}")
    done = bench(*arguments, status=2)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert sentence in done.stderr
