import functools

import pytest

from support import run_command


@pytest.fixture
def bench(tmp_path):
    """``bench(*arguments)``: run ``batchnorm bench`` in an empty folder."""
    return functools.partial(run_command, "bench", cwd=tmp_path)
