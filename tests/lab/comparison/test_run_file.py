"""run.json: written whole or not at all, and checked when it is read."""

import math
import resource

import pytest

from batchnorm.errors import RunError
from batchnorm.lab.comparison.folders import new_folder
from batchnorm.lab.comparison.request import Request
from batchnorm.lab.comparison.run_file import RunFile, TrainedStack, read_run
from batchnorm.lab.data.dataset import DataDescription
from batchnorm.lab.files import write_file
from batchnorm.lab.training import runs
from batchnorm.lab.training.settings import Settings

DATA = DataDescription("rows", "classification", "y", {"train": 3}, ["x"], ["a", "b"], [], [], "0" * 64)


def test_a_run_is_read_as_it_was_saved(tmp_path):
    test = runs.TestResult(1, math.nan, "")
    trained = runs.Run("none", 0.1, 3, 2, [1.0, math.nan], [math.inf, math.nan], [0.5, math.nan], test)
    run = RunFile.create(tmp_path, DATA, Settings(hidden=(8,)), request=Request("rows.csv", claims=["shift"]))
    run.stacks.append(TrainedStack("k/none/0", "p", "none", 1.0, [trained]))
    run.extension = {"more": [1]}
    run.save()
    back = read_run(tmp_path)
    assert (back.settings, back.data, back.request) == (run.settings, run.data, run.request)
    (read,) = back.runs("p", "none")
    assert read.validation_loss[0] == math.inf
    assert all(math.isnan(value) for value in (read.train_loss[1], read.validation_score[1], read.test.score))
    assert (read.seed, read.diverged_at) == (3, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "folder of a run, with a run.json"),
        ("{", "can't be read"),
        ("[]", "is something else"),
        ('{"format": "other"}', "is something else"),
        ('{"format": "batchnorm-run", "version": 2}', "lacks status, created"),
        ('{"format": "batchnorm-run", "version": 1}', "format version 2; .* is of version 1, which another"),
    ],
)
def test_a_file_that_is_no_run_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=message):
        read_run(tmp_path)


def test_run_json_names_no_user_host_or_folder(tmp_path):
    import getpass
    import socket

    RunFile.create(tmp_path, DATA, Settings()).save()
    text = (tmp_path / "run.json").read_text()
    assert socket.gethostname() not in text
    assert f'"{getpass.getuser()}"' not in text
    assert str(tmp_path) not in text


def test_a_new_folder_is_the_next_free_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [new_folder(None, "digits").name for _ in range(3)] == ["digits-1", "digits-2", "digits-3"]


def test_a_folder_that_is_not_empty_is_refused_and_left_unchanged(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match=r"new or an empty folder; .* contains thesis\.tex"):
        new_folder(tmp_path, "digits")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunError, match=r"must be a folder; .*thesis\.tex' is a file"):
        new_folder(tmp_path / "thesis.tex", "digits")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="must be a writable folder"):
        new_folder(tmp_path / "file" / "run", "digits")


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_litter(tmp_path):
    path = tmp_path / "run.json"
    write_file(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(RunError, match="must be writable, with disk to spare: File too large"):
            write_file(path, "new" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
