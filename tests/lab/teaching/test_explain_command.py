"""``batchnorm explain --html``: the file that it writes, and the files that it refuses to write."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import polars as pl
import pytest

from batchnorm.lab.teaching.worked_example import worked_example
from explain_support import NASTY, ExplainVisit
from support import run_command, usage_error


def explain(*arguments, cwd):
    """Run ``batchnorm explain`` in a folder and return what it prints."""
    return run_command("explain", *arguments, cwd=cwd).stdout


def refusal(*arguments, cwd):
    """Run ``batchnorm explain``, which must fail, in a folder and return the sentence that it prints."""
    return usage_error("explain", *arguments, cwd=cwd)


def test_the_command_writes_the_page_and_says_where(tmp_path, notes_page):
    assert explain("--html", "page.html", cwd=tmp_path) == "Page: page.html\n"
    assert (tmp_path / "page.html").read_text() == notes_page.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_with_json_the_page_is_written_and_json_is_all_that_is_printed(tmp_path):
    printed = explain("--html", "page.html", "--json", cwd=tmp_path)
    assert json.loads(printed) == worked_example().to_dict()
    assert (tmp_path / "page.html").exists()


@pytest.mark.browser
def test_a_table_of_the_users_gives_the_page_its_first_rows_names_and_nonlinearity(chromium, tmp_path):
    frame = pl.DataFrame({NASTY: [1.5, 2.0, 4.0, 3.5, 9.0], "iq": [9, 8, 5, 6, 1], "t": [1, 0, 1, 0, 1]})
    frame.write_csv(tmp_path / "rows.csv")
    explain("rows.csv", "--target", "t", "--activation", "relu", "--html", "page.html", cwd=tmp_path)
    visit = ExplainVisit(chromium, tmp_path / "page.html")
    shown = [[float(visit.input(f"features.{i}.{j}").input_value()) for j in range(2)] for i in range(4)]
    assert shown == [[1.5, 9], [2, 8], [4, 5], [3.5, 6]]
    assert visit.page.inner_text(".rows thead").split("\t")[1:4] == [NASTY, "iq", "t"]
    assert visit.text("g.formula") == "relu(v) = max(0, v)"
    assert visit.complaints == []
    visit.context.close()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("rows.csv", "error: --html must name an .html file; got 'rows.csv'"),
        ("", "error: --html must name an .html file; got '.'"),
        ("folder.html", "error: --html must name a file; 'folder.html' is a folder"),
        ("pipe.html", "error: --html must name a file; 'pipe.html' is a device or a pipe"),
        (
            "absent/page.html",
            "error: --html must name a file in a folder that exists; there is no folder 'absent'",
        ),
        ("rows.csv/page.html", "error: --html must name a file in a folder that exists; there is no folder 'rows.csv'"),
        (
            f"{'n' * 300}.html",
            f"error: --html must name a file that can be written; '{'n' * 300}.html': File name too long",
        ),
    ],
)
def test_a_file_that_can_not_be_written_is_one_sentence_and_status_2(tmp_path, name, sentence):
    (tmp_path / "rows.csv").write_text("a,b,y\n")
    (tmp_path / "folder.html").mkdir()
    os.mkfifo(tmp_path / "pipe.html")
    assert refusal("--html", name, cwd=tmp_path) == sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.html", "pipe.html", "rows.csv"]
    assert (tmp_path / "rows.csv").read_text() == "a,b,y\n"


def test_data_that_can_not_be_used_leave_the_page_that_was_there(tmp_path):
    (tmp_path / "page.html").write_text("old")
    (tmp_path / "rows.csv").write_text("a,b,y\n1e300,1,0\n-1e300,2,1\n3e300,5,0\n")
    sentence = refusal("rows.csv", "--html", "page.html", cwd=tmp_path)
    assert sentence.startswith("error: a, b must be numbers whose squares are finite; got [1e+300,")
    assert (tmp_path / "page.html").read_text() == "old"


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 1,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_on_a_full_disk_the_old_page_stays_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "page.html").write_text("old")
    with full_disk():
        sentence = refusal("--html", "page.html", cwd=tmp_path)
    assert sentence == "error: 'page.html' must be writable, with disk to spare: File too large"
    assert (tmp_path / "page.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_in_a_read_only_folder_the_old_page_stays():
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), os.geteuid()
        (folder / "page.html").write_text("old")
        folder.chmod(0o555)
        try:
            if user == 0:  # to whom no folder is read-only
                os.seteuid(65534)
            sentence = refusal("--html", folder / "page.html", cwd="/")
        finally:
            os.seteuid(user)
            folder.chmod(0o755)
        assert sentence == f"error: '{folder}/page.html' must be writable, with disk to spare: Permission denied"
        assert (folder / "page.html").read_text() == "old"
        assert [path.name for path in folder.iterdir()] == ["page.html"]


INTERRUPTED = """
import os, signal, sys
sys.addaudithook(lambda event, _: os.kill(os.getpid(), signal.SIGINT) if event == "os.rename" else None)
from batchnorm.cli import main
main()
"""


def test_ctrl_c_while_the_page_is_written_leaves_the_old_one_and_no_litter(tmp_path):
    (tmp_path / "page.html").write_text("old")
    command = [sys.executable, "-W", "error", "-c", INTERRUPTED, "explain", "--html", "page.html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert (tmp_path / "page.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "page.html").symlink_to("there/page.html")
    explain("--html", "page.html", cwd=tmp_path)
    assert (tmp_path / "page.html").is_symlink()
    assert (tmp_path / "there/page.html").stat().st_size > 10_000
