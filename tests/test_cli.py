"""The command line as a user runs it: its output, its exit status, its files."""

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

from batchnorm.cli import main
from batchnorm.lab.claims import CLAIMS
from batchnorm.lab.data.tables import BUILT_IN

QUICK = ["--hidden", "8", "--steps", "40", "--search-seeds", "1", "--seeds", "2", "--learning-rates", "0.1,0.3"]


def batchnorm(*arguments, cwd=".", status=0):
    """Run the command in a folder, in this process, in a terminal of 80 columns."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, os.environ.get("COLUMNS")
    sys.argv, os.environ["COLUMNS"] = ["batchnorm", *map(str, arguments)], "80"
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            main()
    finally:
        sys.argv = before[0]
        os.environ.pop("COLUMNS")
        if before[1] is not None:
            os.environ["COLUMNS"] = before[1]
    assert (ended.value.code or 0) == status, err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def refused(*arguments, cwd="."):
    """The one sentence of a usage error, which exits 2 and prints no result."""
    done = batchnorm(*arguments, cwd=cwd, status=2)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    return folder, batchnorm("compare", "digits", *QUICK, cwd=folder)


def test_compare_ends_with_verdict_table_caveat_and_report_in_80_columns(finished):
    folder, done = finished
    text = done.stdout
    assert "On digits " in text
    heading = next(i for i, line in enumerate(text.splitlines()) if line.startswith("batch norm   "))
    headings = re.split(r"\s{2,}", text.splitlines()[heading])
    assert headings == ["batch norm", "rate", "steps", "ratio of steps", "reached at", "test accuracy"]
    assert [line.split()[0] for line in text.splitlines()[heading + 1 : heading + 4]] == ["none", "before", "after"]
    assert text.splitlines()[-1] == "Report: batchnorm-runs/digits-1/report.html"
    assert "Caveat: " in text
    assert max(map(len, text.splitlines())) <= 80
    assert (folder / "batchnorm-runs/digits-1/report.html").stat().st_size < 6_000_000


def test_compare_says_what_the_data_is_and_what_it_left_out_on_stderr(finished):
    _, done = finished
    assert "61 features to predict target; rows to train on 1078" in " ".join(done.stderr.split())
    assert "column pixel_0_0 is left out: it has one value" in done.stderr
    assert max(map(len, done.stderr.splitlines())) <= 80


def test_run_json_holds_the_command_that_makes_it_again(finished):
    folder, _ = finished
    content = json.loads((folder / "batchnorm-runs/digits-1/run.json").read_text())
    assert content["command"].startswith("batchnorm compare digits --hidden 8 --steps 40")


def test_report_draws_the_page_again(finished):
    folder, _ = finished
    page = folder / "batchnorm-runs/digits-1/report.html"
    before = page.read_text()
    page.unlink()
    done = batchnorm("report", "batchnorm-runs/digits-1", cwd=folder)
    assert done.stdout == "Report: batchnorm-runs/digits-1/report.html\n"
    assert page.read_text() == before


def test_json_is_all_that_stdout_holds_and_quiet_keeps_stderr_empty(tmp_path):
    done = batchnorm("compare", "placement", "--rows", "600", *QUICK, "--json", "--quiet", "--out", tmp_path / "out")
    result = json.loads(done.stdout)
    assert result["score_name"] == "accuracy"
    assert set(result["arms"]) == {"none", "before", "after"}
    assert done.stderr == ""


def test_a_file_with_missing_values_texts_and_an_index_is_compared(tmp_path):
    n = 300
    frame = pl.DataFrame(
        {
            "No": range(n),
            "size": [None if i % 9 == 0 else (i * 37 % 101) / 10 for i in range(n)],
            "city": [None if i % 11 == 0 else ["Rome", "Oslo", "Lima"][i % 3] for i in range(n)],
            "sold": ["yes" if (i * 37 % 101) + 20 * (i % 3) > 70 else "no" for i in range(n)],
        }
    )
    frame.write_csv(tmp_path / "homes.csv")
    done = batchnorm("compare", "homes.csv", "--target", "sold", *QUICK, cwd=tmp_path)
    assert "column No is left out: it counts the rows, as an index does" in done.stderr
    assert "missing numbers are filled" in " ".join(done.stderr.split())
    assert "classification: sold has 2 categories" in done.stderr
    assert "Only 60 validation rows" in done.stdout


def test_a_parquet_file_with_a_regression_target_is_compared(tmp_path):
    x = [(i * 37 % 101) / 10 for i in range(600)]
    pl.DataFrame({"x": x, "z": x[::-1], "price": [a * a + 0.5 for a in x]}).write_parquet(tmp_path / "homes.parquet")
    done = batchnorm("compare", "homes.parquet", "--target", "price", *QUICK, cwd=tmp_path)
    assert "regression: price is a number" in done.stderr
    assert "Test R2 against none" in done.stdout


def test_a_batch_size_larger_than_the_data_is_reduced_and_said(tmp_path):
    done = batchnorm("compare", "wine", *QUICK, "--batch-size", "999", "--out", tmp_path / "out")
    assert "the batch size of 999 is reduced to the 107 training rows" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["compare", "absent.csv"], "there is no file 'absent.csv'"),
        (["compare", "homes.csv", "--target", "price"], "got 'price', the columns are size, city, one"),
        (["compare", "homes.csv", "--target", "one"], "'one' has 1: 1"),
        (
            ["compare", "homes.csv", "--target", "city", "--task", "regression"],
            "'city' must hold numbers; it holds 'a'",
        ),
        (["compare", "digits", "--out", "."], "new or an empty folder; '.' holds homes.csv"),
        (["compare", "digits", "--steps", "0"], "steps must be at least 1; got 0"),
        (["compare", "digits", "--steps", "many"], "'--steps'"),
        (["compare", "digits", "--hidden", "ten"], "--hidden must be whole numbers separated by commas; got 'ten'"),
        (["compare", "digits", "--activation", "swish"], "one of identity, sigmoid, tanh, relu; got 'swish'"),
        (["compare", "digits", "--task", "ranking"], "classification or regression; got 'ranking'"),
        (["compare", "digits", "--claim", "speed"], "must be some of fewer_steps, stability, "),
        (["compare", "digits", "--study", "--claim", "shift"], "--study measures every claim; got --claim shift too"),
        (["compare", "--fast"], "--fast"),
        (["compare", "--resume", "."], "with a run.json; '.' has none"),
        (["compare", "digits", "--resume", "."], "got DATA too"),
        (["report", "."], "with a run.json; '.' has none"),
        (["explain", "homes.csv", "--target", "one"], "2 columns of numbers besides the target; got size"),
        (["explain", "--activation", "swish"], "got 'swish'"),
        (["expalin"], "expalin"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2_and_writes_nothing(tmp_path, arguments, sentence):
    frame = pl.DataFrame({"size": [1.5, 2.5, 0.5] * 20, "city": ["a", "b", "c"] * 20, "one": [1] * 60})
    frame.write_csv(tmp_path / "homes.csv")
    assert sentence in refused(*arguments, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["homes.csv"]


def test_explain_prints_the_worked_example_in_80_columns_and_as_json():
    done = batchnorm("explain")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "91?" in done.stdout
    assert json.loads(batchnorm("explain", "--json").stdout)["features"] == ["cgpa", "iq"]


def test_explain_takes_the_first_rows_of_a_file(tmp_path):
    pl.DataFrame(
        {"No": [0, 1, 2, 3, 4], "a": [1.5, None, 2.0, 4.0, 3.0], "b": [9, 7, 8, 5, 6], "t": [1, 0, 1, 0, 1]}
    ).write_csv(tmp_path / "rows.csv")
    figures = json.loads(batchnorm("explain", "rows.csv", "--target", "t", "--json", cwd=tmp_path).stdout)
    assert figures["features"] == ["a", "b"]
    assert [row["features"] for row in figures["rows"]] == [[1.5, 9], [2, 8], [4, 5], [3, 6]]


def test_help_and_version():
    assert "compare" in batchnorm().stdout
    assert "compare" in batchnorm("--help").stdout
    assert batchnorm("--version").stdout == "batchnorm 0.1.0\n"


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_keeps_what_is_finished_and_resume_goes_on(tmp_path, jobs):
    folder = tmp_path / "run"
    settings = ["--hidden", "16,16", "--steps", "400", "--search-seeds", "1", "--seeds", "2", "--jobs", str(jobs)]
    script = "from batchnorm.cli import main; main()"
    command = [sys.executable, "-W", "error", "-c", script, "compare", "digits", *settings, "--out", str(folder)]
    # In a session of its own with a terminal, as a shell has it: Ctrl-C reaches the workers too.
    terminal, of_process = pty.openpty()
    process = subprocess.Popen(
        command, stdin=of_process, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (folder / "run.json").exists() and json.loads((folder / "run.json").read_text())["stacks"]:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    os.close(terminal)
    os.close(of_process)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "are kept" in err
    assert f"batchnorm compare --resume {folder}" in err
    assert out == ""
    kept = json.loads((folder / "run.json").read_text())
    assert kept["status"] == "interrupted"
    assert kept["stacks"]
    assert batchnorm("report", folder).stdout == f"Report: {folder}/report.html\n"
    done = batchnorm("compare", "--resume", folder, "--quiet")
    assert "On digits " in done.stdout
    whole = json.loads((folder / "run.json").read_text())
    assert whole["status"] == "complete"
    assert whole["stacks"][: len(kept["stacks"])] == kept["stacks"]
    assert "is complete" in refused("compare", "--resume", folder)


def test_a_resumed_run_needs_the_data_as_they_were(tmp_path):
    frame = pl.DataFrame({"a": [float(i * 37 % 101) for i in range(60)], "t": [0, 1, 1] * 20})
    frame.write_csv(tmp_path / "rows.csv")
    batchnorm("compare", "rows.csv", "--target", "t", *QUICK, "--quiet", "--out", "run", cwd=tmp_path)
    path = tmp_path / "run/run.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"status": "interrupted"}))
    frame.with_columns(pl.col("a") + 1).write_csv(tmp_path / "rows.csv")
    assert "'rows.csv' has changed" in refused("compare", "--resume", "run", cwd=tmp_path)


def test_a_study_ends_with_a_verdict_for_each_claim_in_80_columns_and_a_resumed_one_has_the_same(tmp_path):
    done = batchnorm("compare", "breast_cancer", *QUICK, "--study", "--quiet", "--out", "run", cwd=tmp_path)
    lines = done.stdout.splitlines()
    claims = [line for line in lines if line.split(":")[0] in CLAIMS]
    assert [line.split(":")[0] for line in claims[:2]] == ["fewer_steps"] * 2
    assert {line.split(":")[0] for line in claims} == set(CLAIMS)
    of_seeds = [line for line in claims if not line.startswith("inputs")]
    assert all("undecided" in line for line in of_seeds)  # two seeds are too few
    assert max(map(len, lines)) <= 80
    path = tmp_path / "run/run.json"
    content = json.loads(path.read_text())
    kept = [stack for stack in content["stacks"] if stack["phase"] != "stability"]
    path.write_text(json.dumps(content | {"status": "interrupted", "stacks": kept}))
    again = batchnorm("compare", "--resume", "run", "--quiet", cwd=tmp_path)
    assert [line for line in again.stdout.splitlines() if line.split(":")[0] in CLAIMS] == claims


def test_one_claim_can_be_asked_for(tmp_path):
    done = batchnorm("compare", "placement", "--rows", "600", *QUICK, "--claim", "inputs", "--json", cwd=tmp_path)
    result = json.loads(done.stdout)
    assert [claim["name"] for claim in result["claims"]] == ["inputs"]
    assert result["claims"][0]["findings"][0]["verdict"] == "holds"


def test_without_the_lab_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; import batchnorm.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: the command line needs pip install 'batchnorm[lab]'; typer is not installed\n"


def test_the_installed_command_is_this_one():
    script = Path(sys.executable).parent / "batchnorm"
    assert (
        subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout == "batchnorm 0.1.0\n"
    )


MODEL = """
import batchnorm as bn
from sklearn.datasets import load_wine
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

def fitted():
    classifier = bn.BatchNormMLPClassifier((8,), batch_size=44, random_state=0, tol=1.0, n_iter_no_change=60)
    return make_pipeline(StandardScaler(), classifier).fit(*load_wine(return_X_y=True))
"""


@pytest.fixture(scope="module")
def wines(tmp_path_factory):
    """A folder with a model of wines, their rows as they are and with every alcohol reading 3 higher."""
    folder = tmp_path_factory.mktemp("wines")
    (folder / "cellar.py").write_text(MODEL)
    frame = BUILT_IN["wine"]()
    frame.write_csv(folder / "same.csv")
    frame.with_columns(pl.col("alcohol") + 3).write_csv(folder / "shifted.csv")
    return folder


def test_shift_shows_distances_a_verdict_and_what_would_mend_it(wines):
    said = batchnorm("shift", "cellar:fitted", "shifted.csv", "--target", "target", cwd=wines).stdout
    assert "hidden.0.norm" in said
    assert "shifted: 178 samples against the stored statistics, p at most 0.001" in said
    assert [line.split()[0] for line in said.splitlines()[-3:]] == ["as", "adapted", "retrained"]
    assert max(map(len, said.splitlines())) <= 80
    same = batchnorm("shift", "cellar:fitted", "same.csv", "--target", "target", cwd=wines).stdout
    assert "no shift shown" in same


def test_shift_as_json_compared_with_clean_rows_fails_where_asked_to(wines):
    arguments = ["shift", "cellar:fitted", "shifted.csv", "--target", "target", "--reference", "same.csv", "--json"]
    content = json.loads(batchnorm(*arguments, "--fail-on-shift", cwd=wines, status=1).stdout)
    assert content["shift"]["clean"] is True
    assert content["scores"]["rows"] == 89
    batchnorm("shift", "cellar:fitted", "same.csv", "--target", "target", "--fail-on-shift", cwd=wines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "same.csv"], "must be MODULE:NAME, as in train:make_model; got 'nothing'"),
        (["cellar:none", "same.csv"], "has no attribute 'none'"),
        (["cellar:fitted", "none.csv"], "there is no file 'none.csv'"),
        (
            ["cellar:fitted", "same.csv", "--target", "target", "--alpha", "2"],
            "error: alpha must be between 0 and 1; got 2.0",
        ),
        (["cellar:fitted", "same.csv", "--target", "target", "--prior", "-1"], "prior must be a finite number"),
    ],
)
def test_shift_refuses_in_one_sentence(wines, arguments, said):
    assert said in refused("shift", *arguments, cwd=wines)


def test_rows_that_the_model_does_not_take_are_refused(wines):
    assert "StandardScaler" in refused("shift", "cellar:fitted", "same.csv", "--columns", "alcohol,ash", cwd=wines)
