import os

import pytest

from batchnorm.errors import RunError
from batchnorm.lab.bench.measure import call_of, time_across_allocators
from batchnorm.lab.bench.processes import in_new_process
from batchnorm.lab.bench.registry import Case


def test_ours_and_torch_are_timed_in_processes_with_either_allocator():
    timing = time_across_allocators(call_of, Case("bn+relu", "train", "float32", (32, 64)), seconds=0)
    assert set(timing.microseconds) == {"ours", "torch", "untuned"}
    assert min(times.low for times in timing.microseconds.values()) > 0
    assert timing.speedup.median > 0


def test_a_process_that_ends_by_itself_is_an_error_with_its_status():
    with in_new_process(os._exit, 3, tuned=False) as sample, pytest.raises(RunError, match="with exit status 3"):
        sample(1)
