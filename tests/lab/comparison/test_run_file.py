"""run.json: written whole or not at all, and read with suspicion."""

import json
import math
import resource

import pytest

from batchnorm.errors import RunError
from batchnorm.lab.comparison.run_file import RunFile, new_folder, read_run
from batchnorm.lab.files import json_safe, write_file


def test_numbers_that_json_lacks_are_kept_as_null_and_text():
    assert json_safe({"a": [math.nan, math.inf, (-math.inf, 1.5)]}) == {"a": [None, "inf", ["-inf", 1.5]]}


def test_a_run_is_read_as_it_was_saved(tmp_path):
    values = {
        "arm": "none",
        "learning_rate": 0.1,
        "seed": 3,
        "diverged_at": 2,
        "train_loss": [1.0, math.nan],
        "validation_loss": [math.inf, math.nan],
        "validation_score": [0.5, math.nan],
        "test": {"step": 1, "score": math.nan, "errors": ""},
        "trace": None,
    }
    run = RunFile.create(tmp_path, command="", request={}, data={}, settings={})
    run.content["stacks"].append({"key": "k/none/0", "phase": "p", "arm": "none", "seconds": 1.0, "runs": [values]})
    run.save()
    (back,) = read_run(tmp_path).runs("p", "none")
    assert back.validation_loss[0] == math.inf
    assert all(math.isnan(value) for value in (back.train_loss[1], back.validation_score[1], back.test.score))
    assert (back.seed, back.diverged_at) == (3, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "folder of a run, with a run.json"),
        ("{", "can't be read"),
        ("[]", "is something else"),
        ('{"format": "other"}', "is something else"),
        ('{"format": "batchnorm-run", "version": 1}', "lacks status, command"),
        ('{"format": "batchnorm-run", "version": 99}', "format version 1; .* is of 99"),
    ],
)
def test_what_is_not_a_run_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=message):
        read_run(tmp_path)


def test_a_run_says_nothing_of_who_and_where(tmp_path):
    import getpass
    import socket

    text = json.dumps(RunFile.create(tmp_path).content)
    assert socket.gethostname() not in text
    assert f'"{getpass.getuser()}"' not in text
    assert str(tmp_path) not in text


def test_a_new_folder_is_the_next_free_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [new_folder(None, "digits").name for _ in range(3)] == ["digits-1", "digits-2", "digits-3"]


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match=r"new or an empty folder; .* holds thesis\.tex"):
        new_folder(tmp_path, "digits")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunError, match=r"must be a folder; .*thesis\.tex' is a file"):
        new_folder(tmp_path / "thesis.tex", "digits")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can be written to"):
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
