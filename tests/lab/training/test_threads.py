"""Limits of torch's threads: exact in their own thread, and nothing of them stays behind."""

import itertools
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm.lab.training.threads import limited_threads, threads_for


def number_of_a_new_thread():
    """Return the number of a thread that uses torch for the first time."""
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture(autouse=True)
def four_threads(set_threads):
    """Give torch 4 threads, and check that a test leaves them to this thread and to new ones."""
    set_threads(4)
    yield
    assert torch.get_num_threads() == number_of_a_new_thread() == 4


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (2, 2), (9, 4)])
def test_a_limit_lowers_the_number_and_never_raises_it(limit, expected):
    with limited_threads(limit):
        assert torch.get_num_threads() == expected


def test_a_limit_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), limited_threads(1):
        _ = 1 / 0
    with limited_threads(2):
        assert torch.get_num_threads() == 2


def test_a_limit_within_a_limit_can_only_lower_it():
    with limited_threads(2):
        with limited_threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with limited_threads(3):
            assert torch.get_num_threads() == 2


class Step:
    """A step of another thread, which waits until it is told to go on."""

    def __init__(self, pool, limit):
        self.entered, self.leave = threading.Event(), threading.Event()
        self.numbers = pool.submit(self.run, limit)
        assert self.entered.wait(10)

    def run(self, limit):
        with limited_threads(limit):
            self.entered.set()
            assert self.leave.wait(10)
            inside = torch.get_num_threads()
        return inside, torch.get_num_threads()

    def end(self):
        self.leave.set()
        return self.numbers.result(10)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_threads_end_their_limits_in_any_order(order):
    with ThreadPoolExecutor(3) as pool:
        steps = [Step(pool, limit) for limit in (1, 2, 3)]
        assert [steps[i].end() for i in order] == [(i + 1, 4) for i in order]


def test_a_limit_leaves_the_numbers_of_other_threads():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 4
        with limited_threads(1):
            assert pool.submit(torch.get_num_threads).result() == 4
            assert number_of_a_new_thread() == 4


def test_a_limit_holds_for_matrix_products_too():
    code = """
import os, torch
from batchnorm.lab.training.threads import limited_threads
torch.set_num_threads(4)
tasks = lambda: len(os.listdir("/proc/self/task"))
x = torch.randn(600, 600)
before = tasks()
with limited_threads(1):
    x @ x, torch.bmm(x[None], x[None]), torch.randn(10**6).sum()
    print(tasks() - before)
x @ x
print(tasks() - before)
"""
    if not Path("/proc/self/task").exists():
        pytest.skip("the system does not count the threads of a process")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    limited, free = map(int, run.stdout.split())
    assert limited == 0
    assert free > 0


@pytest.mark.parametrize(
    ("sizes", "dtype", "rows", "products", "expected"),
    [
        ((64, 100, 10), torch.float64, 200, 3, 1),  # digits at the defaults
        ((64, 100, 10), torch.float64, 4096, 1, 1),
        ((784, 256, 10), torch.float32, 200, 3, 1),
        ((784, 256, 10), torch.float64, 200, 3, 2),
        ((784, 256, 10), torch.float64, 200, 1, 1),
        ((784, 1024, 1024, 10), torch.float64, 200, 3, 22),
        ((1, 1), torch.float32, 1, 1, 1),
    ],
)
def test_threads_follow_from_the_bytes_of_the_weights_and_the_rows(sizes, dtype, rows, products, expected):
    layers = [nn.Linear(a, b, bias=False, dtype=dtype) for a, b in itertools.pairwise(sizes)]
    assert threads_for(nn.Sequential(*layers), rows, products) == expected
