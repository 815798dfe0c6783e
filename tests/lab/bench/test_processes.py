import os

import pytest

from batchnorm.errors import RunError
from batchnorm.lab.bench.processes import elsewhere
from batchnorm.lab.bench.registry import Case
from batchnorm.lab.bench.run import across_allocators, call_of


def test_ours_and_torch_are_timed_in_processes_with_either_allocator():
    result = across_allocators(call_of, Case("bn+relu", "train", "float32", (32, 64)), seconds=0)
    assert set(result["microseconds"]) == {"ours", "torch", "untuned"}
    assert min(times["low"] for times in result["microseconds"].values()) > 0
    assert result["times_faster"]["median"] > 0


def test_a_process_that_ends_by_itself_is_an_error_with_its_status():
    with elsewhere(os._exit, 3, tuned=False) as sample, pytest.raises(RunError, match="ended with status 3"):
        sample(1)
