"""The command line as a user runs it: its output, its exit status, its files."""

import inspect
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import polars as pl
import pytest

import batchnorm as bn
from batchnorm.cli import app
from batchnorm.cli.compare import CLAIMS as OFFERED_CLAIMS
from batchnorm.cli.compare import Task as OfferedTask
from batchnorm.lab.claims import CLAIMS
from batchnorm.lab.data.dataset import Task
from batchnorm.lab.data.sources import BUILT_IN_NAMES
from batchnorm.lab.data.tables import BUILT_IN
from batchnorm.lab.training import settings
from batchnorm.lab.training.network import ACTIVATIONS
from support import run_command, usage_error

QUICK = ["--hidden", "8", "--steps", "40", "--search-seeds", "1", "--seeds", "2", "--learning-rates", "0.1,0.3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    return folder, run_command("compare", "digits", *QUICK, cwd=folder)


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
    done = run_command("report", "batchnorm-runs/digits-1", cwd=folder)
    assert done.stdout == "Report: batchnorm-runs/digits-1/report.html\n"
    assert page.read_text() == before


def test_json_is_all_that_stdout_holds_and_quiet_keeps_stderr_empty(tmp_path):
    done = run_command("compare", "placement", "--rows", "600", *QUICK, "--json", "--quiet", "--out", tmp_path / "out")
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
    done = run_command("compare", "homes.csv", "--target", "sold", *QUICK, cwd=tmp_path)
    assert "column No is left out: it counts the rows, as an index does" in done.stderr
    assert "missing numbers are filled" in " ".join(done.stderr.split())
    assert "classification: sold has 2 categories" in done.stderr
    assert "Only 60 validation rows" in done.stdout


def test_a_parquet_file_with_a_regression_target_is_compared(tmp_path):
    x = [(i * 37 % 101) / 10 for i in range(600)]
    pl.DataFrame({"x": x, "z": x[::-1], "price": [a * a + 0.5 for a in x]}).write_parquet(tmp_path / "homes.parquet")
    done = run_command("compare", "homes.parquet", "--target", "price", *QUICK, cwd=tmp_path)
    assert "regression: price is a number" in done.stderr
    assert "Test R2 against none" in done.stdout


def test_a_batch_size_larger_than_the_data_is_reduced_and_said(tmp_path):
    done = run_command("compare", "wine", *QUICK, "--batch-size", "999", "--out", tmp_path / "out")
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
        (["compare", "digits", "--out", "."], "new or an empty folder; '.' contains homes.csv"),
        (["compare", "digits", "--steps", "0"], "--steps must be at least 1; got 0"),
        (["compare", "digits", "--steps", "many"], "'--steps'"),
        (["compare", "digits", "--hidden", "ten"], "--hidden must be whole numbers separated by commas; got 'ten'"),
        (["compare", "digits", "--activation", "swish"], "--activation must be one of identity, sigmoid, tanh"),
        (["compare", "digits", "--task", "ranking"], "--task must be one of classification, regression; got 'ranking'"),
        (["compare", "digits", "--claim", "speed"], "--claim must be one of fewer_steps, stability, "),
        (["compare", "digits", "--study", "--claim", "shift"], "--study tests every claim and excludes --claim"),
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
    assert sentence in usage_error(*arguments, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["homes.csv"]


def test_explain_prints_the_worked_example_in_80_columns_and_as_json():
    done = run_command("explain")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "91?" in done.stdout
    assert json.loads(run_command("explain", "--json").stdout)["features"] == ["cgpa", "iq"]


def test_explain_takes_the_first_rows_of_a_file(tmp_path):
    pl.DataFrame(
        {"No": [0, 1, 2, 3, 4], "a": [1.5, None, 2.0, 4.0, 3.0], "b": [9, 7, 8, 5, 6], "t": [1, 0, 1, 0, 1]}
    ).write_csv(tmp_path / "rows.csv")
    figures = json.loads(run_command("explain", "rows.csv", "--target", "t", "--json", cwd=tmp_path).stdout)
    assert figures["features"] == ["a", "b"]
    assert [row["features"] for row in figures["rows"]] == [[1.5, 9], [2, 8], [4, 5], [3, 6]]


def test_help_and_version():
    assert "compare" in run_command().stdout
    assert "compare" in run_command("--help").stdout
    assert run_command("--version").stdout == f"batchnorm {bn.__version__}\n"


@pytest.mark.parametrize("width", [50, 80, 200])
def test_the_list_of_commands_has_each_summary_whole(width):
    text = run_command("--help", columns=width).stdout
    assert max(map(len, text.splitlines())) <= min(width, 80)
    listed = " ".join(text.partition("Commands:")[2].split())
    for command in app.registered_commands:
        assert f"{command.callback.__name__} {inspect.getdoc(command.callback).splitlines()[0]}" in listed
    assert "..." not in listed


@pytest.mark.parametrize("command", [command.callback.__name__ for command in app.registered_commands])
def test_the_help_of_a_command_names_what_it_takes_and_shows_no_types(command):
    text = run_command(command, "--help").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert re.findall(r"<[^>]*>|\{[^}]*\}|\b(INTEGER|FLOAT|PATH|STR|INT)\b", text) == []
    usage, _, described = text.partition("\n\n")
    for argument in usage.split("[OPTIONS]")[1].split():
        assert re.search(rf"^  {argument.strip('[]')}  ", described, re.MULTILINE)


HEAVY = ["torch", "numpy", "scipy", "sklearn", "polars", "plotly", "joblib", "jinja2"]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([], 0),
        (["--help"], 0),
        (["--version"], 0),
        (["compare", "--help"], 0),
        (["--show-completion", "bash"], 0),
        (["--fast"], 2),
        (["expalin"], 2),
        (["compare", "--steps", "many"], 2),
        (["compare", "--steps", "0"], 2),
        (["compare", "--init", "zero"], 2),
        (["compare", "--activation", "swish"], 2),
        (["compare", "--claim", "speed"], 2),
        (["compare", "--hidden", "ten"], 2),
        (["compare", "--study", "--claim", "shift"], 2),
        (["compare", "digits", "--resume", "."], 2),
        (["explain", "--activation", "swish"], 2),
        (["shift", "model", "digits", "--alpha", "2"], 2),
        (["report"], 2),
        (["report", "absent"], 2),
        (["compare", "absent.csv"], 2),
        (["compare", "--out", "."], 2),
        (["compare", "--resume", "absent"], 2),
        (["explain", "absent.csv"], 2),
        (["shift", "model", "digits"], 2),
        (["shift", "model:name", "absent.csv"], 2),
        (["bench", "--only", "gelu"], 2),
        (["bench", "--models", "--quick"], 2),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_help_and_usage_errors_do_not_wait_for_heavy_imports(arguments, status):
    code = (
        "import sys\n"
        "from batchnorm.cli import main\n"
        f"sys.argv[1:] = {arguments}\n"
        "try:\n    main()\n"
        "except SystemExit as ended:\n"
        f"    print([name for name in {HEAVY} if name in sys.modules], ended.code or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"[] {status}"


def test_completion_offers_commands_options_and_claims():
    for words, offered in {"com": "compare", "compare --cl": "--claim", "compare --claim sta": "stability"}.items():
        variables = {"_BATCHNORM_COMPLETE": "complete_bash", "COMP_WORDS": f"batchnorm {words}"}
        variables["COMP_CWORD"] = str(len(words.split()))
        script = "import sys; sys.argv[0] = 'batchnorm'; from batchnorm.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=os.environ | variables
        )
        assert offered in done.stdout.split(), done.stderr


def test_the_names_that_the_command_line_offers_are_those_of_the_lab():
    assert get_args(settings.Activation) == tuple(ACTIVATIONS)
    assert get_args(OfferedTask) == get_args(Task)
    assert tuple(CLAIMS) == OFFERED_CLAIMS
    assert tuple(BUILT_IN) == BUILT_IN_NAMES


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
    assert run_command("report", folder).stdout == f"Report: {folder}/report.html\n"
    done = run_command("compare", "--resume", folder, "--quiet")
    assert "On digits " in done.stdout
    whole = json.loads((folder / "run.json").read_text())
    assert whole["status"] == "complete"
    assert whole["stacks"][: len(kept["stacks"])] == kept["stacks"]
    assert "is complete" in usage_error("compare", "--resume", folder)


def test_a_resumed_run_needs_the_data_as_they_were(tmp_path):
    frame = pl.DataFrame({"a": [float(i * 37 % 101) for i in range(60)], "t": [0, 1, 1] * 20})
    frame.write_csv(tmp_path / "rows.csv")
    run_command("compare", "rows.csv", "--target", "t", *QUICK, "--quiet", "--out", "run", cwd=tmp_path)
    path = tmp_path / "run/run.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"status": "interrupted"}))
    frame.with_columns(pl.col("a") + 1).write_csv(tmp_path / "rows.csv")
    assert "'rows.csv' has changed" in usage_error("compare", "--resume", "run", cwd=tmp_path)


def test_a_study_ends_with_a_verdict_per_claim_and_a_resumed_one_with_the_same(tmp_path):
    done = run_command("compare", "breast_cancer", *QUICK, "--study", "--quiet", "--out", "run", cwd=tmp_path)
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
    again = run_command("compare", "--resume", "run", "--quiet", cwd=tmp_path)
    assert [line for line in again.stdout.splitlines() if line.split(":")[0] in CLAIMS] == claims


def test_one_claim_can_be_asked_for(tmp_path):
    done = run_command("compare", "placement", "--rows", "600", *QUICK, "--claim", "inputs", "--json", cwd=tmp_path)
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
    said = run_command("shift", "cellar:fitted", "shifted.csv", "--target", "target", cwd=wines).stdout
    assert "hidden.0.norm" in said
    assert "shifted: 178 samples against the stored statistics, p at most 0.001" in said
    assert [line.split()[0] for line in said.splitlines()[-3:]] == ["as", "adapted", "retrained"]
    assert max(map(len, said.splitlines())) <= 80
    same = run_command("shift", "cellar:fitted", "same.csv", "--target", "target", cwd=wines).stdout
    assert "no shift shown" in same


def test_shift_as_json_compared_with_clean_rows_fails_where_asked_to(wines):
    arguments = ["shift", "cellar:fitted", "shifted.csv", "--target", "target", "--reference", "same.csv", "--json"]
    content = json.loads(run_command(*arguments, "--fail-on-shift", cwd=wines, status=1).stdout)
    assert content["shift"]["against"] == "reference"
    assert content["scores"]["rows"] == 89
    run_command("shift", "cellar:fitted", "same.csv", "--target", "target", "--fail-on-shift", cwd=wines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "same.csv"], "must be MODULE:NAME, such as train:make_model; got 'nothing'"),
        (["cellar:none", "same.csv"], "has no attribute 'none'"),
        (["cellar:fitted", "none.csv"], "there is no file 'none.csv'"),
        (
            ["cellar:fitted", "same.csv", "--target", "target", "--alpha", "2"],
            "error: --alpha must be between 0 and 1; got 2.0",
        ),
        (
            ["cellar:fitted", "same.csv", "--target", "target", "--prior", "-1"],
            "--prior must be at least 0; got -1.0",
        ),
    ],
)
def test_shift_refuses_in_one_sentence(wines, arguments, said):
    assert said in usage_error("shift", *arguments, cwd=wines)


def test_rows_that_the_model_does_not_take_are_refused(wines):
    assert "StandardScaler" in usage_error("shift", "cellar:fitted", "same.csv", "--columns", "alcohol,ash", cwd=wines)
