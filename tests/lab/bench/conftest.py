import contextlib
import io
import os
import sys
from types import SimpleNamespace

import pytest

from batchnorm.cli import main


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Run `batchnorm bench` in this process, in an empty folder and a terminal of 80 columns."""

    def run(*arguments, status=0):
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "argv", ["batchnorm", "bench", *map(str, arguments)])
        monkeypatch.setitem(os.environ, "COLUMNS", "80")
        with (
            contextlib.chdir(tmp_path),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            main()
        assert (ended.value.code or 0) == status, err.getvalue()
        return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())

    return run
