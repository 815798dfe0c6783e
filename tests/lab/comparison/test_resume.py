"""Starting a run from a request, and resuming it."""

from dataclasses import replace

import polars as pl
import pytest

from batchnorm.errors import RunError
from batchnorm.lab.comparison.request import Request
from batchnorm.lab.comparison.resume import resume_run, start_run
from batchnorm.lab.comparison.run_file import RunFile
from batchnorm.lab.training.settings import Settings

FRAME = pl.DataFrame({"a": [float(i * 37 % 101) for i in range(60)], "t": [0, 1, 1] * 20})


@pytest.fixture
def request_of_rows(tmp_path):
    FRAME.write_csv(tmp_path / "rows.csv")
    return Request(str(tmp_path / "rows.csv"), "t")


def started(request, folder, **settings):
    run, dataset = start_run(request, Settings(hidden=(8,), **settings), out=folder)
    run.save()
    return run, dataset


def test_an_unfinished_run_is_resumed_with_its_settings_and_its_data(request_of_rows, tmp_path):
    run, dataset = started(request_of_rows, tmp_path / "run", seed=3, batch_size=20)
    resumed, again = resume_run(tmp_path / "run")
    assert resumed.settings == run.settings
    assert again.fingerprint == dataset.fingerprint
    assert run.data.notes == dataset.notes


def test_a_batch_size_above_the_training_rows_is_reduced_with_a_note(request_of_rows, tmp_path):
    run, dataset = started(request_of_rows, tmp_path / "run", batch_size=60)
    assert run.settings.batch_size == 36
    assert run.data.notes == [*dataset.notes, "the batch size of 60 is reduced to the 36 training rows"]


def test_a_complete_run_is_not_resumed(request_of_rows, tmp_path):
    run, _ = started(request_of_rows, tmp_path / "run", batch_size=20)
    run.status = "complete"
    run.save()
    with pytest.raises(RunError, match=r"resume must name the folder of an unfinished run; .* is complete"):
        resume_run(tmp_path / "run")


def test_a_run_whose_data_have_changed_is_not_resumed(request_of_rows, tmp_path):
    started(request_of_rows, tmp_path / "run", batch_size=20)
    FRAME.with_columns(pl.col("a") + 1).write_csv(tmp_path / "rows.csv")
    with pytest.raises(RunError, match=r"resume needs the data as they were; .*rows\.csv' has changed"):
        resume_run(tmp_path / "run")


def test_a_run_of_data_from_python_is_not_resumed(request_of_rows, tmp_path):
    run, dataset = started(request_of_rows, tmp_path / "run", batch_size=20)
    RunFile.create(tmp_path / "run", dataset.describe(), replace(run.settings)).save()
    with pytest.raises(RunError, match="the data of this one came from Python"):
        resume_run(tmp_path / "run")


def test_a_resumed_run_reads_its_file_with_the_same_decisions(tmp_path):
    rows = "".join(f"{i * 7 % 11},0{i % 9 + 1}/0{i % 7 + 1}/2020,{i % 2}\n" for i in range(60))
    (tmp_path / "rows.csv").write_text(f"x,day,t\n{rows}unbekannt,01/02/2020,1\n")
    request = Request(str(tmp_path / "rows.csv"), "t", missing=["unbekannt"], dates="month-first", header=True)
    run, dataset = started(request, tmp_path / "run", batch_size=20)
    resumed, again = resume_run(tmp_path / "run")
    assert resumed.request == request
    assert again.notes == dataset.notes == run.data.notes
    assert "column x: 'unbekannt' in line 62 is taken as missing" in again.notes
