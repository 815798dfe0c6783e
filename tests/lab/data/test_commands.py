"""The commands that read a table: one set of rules and options for all, and errors that name the options."""

import json

import pytest

from support import run_command, usage_error

QUICK = ["--hidden", "4", "--steps", "20", "--search-seeds", "1", "--seeds", "2", "--learning-rates", "0.1"]
QUICK += ["--jobs", "1"]
ROWS = [f"{i * 7 % 11},{i * 5 % 13},{i % 2}" for i in range(40)]
WITH_HYPHEN = "\n".join(["size,rooms,y", *ROWS, "-,3,1"])
WITH_MARK = "\n".join(["size,rooms,y", *ROWS, '"$1,200",3,1'])
MODEL = "import torch, batchnorm as bn\nmodel = torch.nn.Sequential(bn.BatchNorm1d(2), torch.nn.Linear(2, 2)).eval()\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hyphen.csv").write_text(WITH_HYPHEN)
    (tmp_path / "mark.csv").write_text(WITH_MARK)
    (tmp_path / "rows.csv").write_text("\n".join(ROWS))
    (tmp_path / "trained_model.py").write_text(MODEL)
    return tmp_path


def test_compare_says_on_both_streams_and_in_its_file_how_cells_were_read(folder):
    note = "column size: '-' in line 42 is no number and taken as missing"
    done = run_command("compare", "hyphen.csv", *QUICK, cwd=folder)
    assert f"- {note}" in done.stderr
    assert f"- {note}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    run = json.loads((folder / "batchnorm-runs/hyphen-1/run.json").read_text())
    assert note in run["result"]["notes"]
    assert note in run["data"]["notes"]


def test_explain_says_how_cells_were_read(folder):
    done = run_command("explain", "mark.csv", cwd=folder)
    assert "Column size: '$1,200' in line 42 is read as 1200." in " ".join(done.stdout.split())


def test_shift_says_how_cells_were_read_and_names_a_missing_one(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    done = run_command("shift", "trained_model:model", "mark.csv", cwd=folder)
    assert "- column size: '$1,200' in line 42 is read as 1200" in done.stdout
    error = usage_error("shift", "trained_model:model", "hyphen.csv", cwd=folder)
    assert "'size' has 1, the first in line 42 (column size: '-' in line 42 is no number" in error


@pytest.mark.parametrize("command", [["compare"], ["explain"], ["shift", "trained_model:model"]])
def test_a_file_without_a_header_is_an_error_that_names_the_options(folder, command):
    error = usage_error(*command, "rows.csv", cwd=folder)
    assert "line 1 of 'rows.csv' looks like a row: '0', '0', '0'. Pass --no-header" in error
    assert "--header if these are names" in error


def test_a_file_without_a_header_is_read_with_numbered_columns(folder):
    done = run_command("explain", "rows.csv", "--no-header", "--target", "column_3", cwd=folder)
    assert "column_1" in done.stdout


def test_a_stray_cell_of_the_target_is_an_error_that_names_file_line_and_option(folder):
    error = usage_error("compare", "hyphen.csv", "--target", "size", cwd=folder)
    assert error == (
        "error: a target of numbers must not have other cells; in 'size' of 'hyphen.csv' there is '-' in line 42. "
        "Correct it, or pass --missing '-' to leave out such rows, or pass --categorical 'size' to keep it as a class"
    )


@pytest.mark.parametrize("command", [["compare"], ["explain"], ["shift", "trained_model:model"]])
@pytest.mark.parametrize("option", ["--numeric", "--categorical"])
def test_every_command_takes_the_options_that_notes_name(folder, command, option):
    error = usage_error(*command, "mark.csv", option, "Size", cwd=folder)
    assert f"{option} must name columns of the data; got 'Size'" in error
    assert "did you mean 'size'?" in error


def test_explain_takes_a_column_with_many_texts_as_numbers_if_asked(folder):
    rows = [f"{i % 7 if i % 4 else 'none at all'},{i * 5 % 13},{i * 3 % 8},{i % 2}" for i in range(40)]
    (folder / "texts.csv").write_text("\n".join(["size,rooms,age,y", *rows]))
    note = "the option numeric takes the others as missing"
    assert note in " ".join(run_command("explain", "texts.csv", cwd=folder).stdout.split())
    done = " ".join(run_command("explain", "texts.csv", "--numeric", "size", cwd=folder).stdout.split())
    assert "'none at all' in line 2 and 9 other cells are no numbers and taken as missing" in done
