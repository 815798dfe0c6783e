"""The line of progress, and the commands that show it in a real terminal of 80 columns."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.lab.console import ProgressLine, Share
from support import run_command, unconverged


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1e6)), max_size=30))
def test_a_share_never_falls_and_stays_between_0_and_1(events):
    share, shown = Share(), [0.0]
    for planned, amount in events:
        (share.plan if planned else share.advance)(amount)
        shown.append(share.value)
    assert shown == sorted(shown)
    assert shown[-1] <= 1


def test_work_that_is_added_moves_the_share_on_slower_until_all_is_done():
    share = Share()
    share.plan(100)
    share.advance(68)
    share.plan(200)
    assert share.value == pytest.approx(0.68)
    share.advance(116)
    assert share.value == pytest.approx(0.84)
    share.advance(116)
    assert share.value == pytest.approx(1)


def test_work_that_is_not_needed_after_all_moves_it_on_faster():
    share = Share()
    share.plan(100)
    share.plan(-50)
    share.advance(25)
    assert share.value == pytest.approx(0.5)


def test_a_line_ignores_a_share_below_the_one_it_shows_and_ends_at_1():
    with ProgressLine() as line:
        task = line._progress.tasks[0]
        line.show("work", share=0.5)
        line.show(share=0.4)
        assert (task.description, task.completed) == ("work", 0.5)
    assert task.completed == 1


def test_a_line_that_is_interrupted_stays_where_it_is():
    line = ProgressLine()
    line.show(share=0.5)
    with pytest.raises(KeyboardInterrupt), line:
        raise KeyboardInterrupt
    assert line._progress.tasks[0].completed == 0.5


def terminal(*arguments, cwd):
    """Run ``batchnorm ARGUMENTS`` in a terminal of 80 columns; return the lines that it showed, and the percentages."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "CI")}
    process = subprocess.Popen(
        [sys.executable, "-m", "batchnorm", *map(str, arguments)],
        cwd=cwd,
        env=variables | {"TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 1 << 16)
        except OSError:  # the process has closed its end
            break
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()))
    return lines, [int(share) for line in lines for share in re.findall(r"━ +(\d+)%", line)]


def test_a_study_moves_from_0_to_100_percent_and_never_back(tmp_path):
    settings = ["--hidden", "8", "--steps", "60", "--search-seeds", "1", "--seeds", "2", "--study"]
    lines, shares = terminal("compare", "placement", "--rows", "600", *settings, "--out", "run", cwd=tmp_path)
    assert shares == sorted(shares)
    assert len(set(shares)) >= 4  # on a busy machine few are drawn
    assert (shares[0], shares[-1]) < (20, 100)
    assert max(map(len, lines)) <= 80
    shown = "\n".join(lines)
    for work in ("starting", "searching learning rates", "confirming and testing claims", "writing the report"):
        assert work in shown


def test_the_benchmark_moves_within_a_case_and_never_back(tmp_path):
    lines, shares = terminal("bench", "--only", "bn/eval/float32/(8x16|32x64)", "--seconds", "1", cwd=tmp_path)
    assert shares == sorted(shares)
    assert [share for share in shares if 0 < share < 50]
    assert [share for share in shares if 50 < share < 100]
    assert max(map(len, lines)) <= 80
    assert any("2 of 2 bn/eval/float32/" in line for line in lines)


MODEL = """
from sklearn.datasets import load_wine
import batchnorm as bn
def fitted():
    return bn.BatchNormMLPClassifier((8,), max_iter=3, tol=1e9, n_iter_no_change=5).fit(*load_wine(return_X_y=True))
"""


@unconverged
def test_a_test_for_a_shift_shows_its_parts_and_leaves_stderr_alone_elsewhere(tmp_path):
    (tmp_path / "train.py").write_text(MODEL)
    lines, _ = terminal("shift", "train:fitted", "wine", cwd=tmp_path)
    shown = "\n".join(lines)
    for work in ("testing for a shift", "adapting", "retraining"):
        assert work in shown
    assert max(len(line) for line in lines if "━" in line) <= 80
    assert run_command("shift", "train:fitted", "wine", cwd=tmp_path).stderr == ""
