"""A busy machine is noticed, said and kept in the results."""

import json
import multiprocessing
import os
import time

import pytest

from batchnorm.lab.bench.processor import ProcessorTime, busy_note
from batchnorm.lab.bench.results_file import read


def spin(seconds):
    """Take processor time without a pause."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_sampler_that_waits_has_no_processor_and_one_that_works_has_one():
    waiting, working = ProcessorTime(), ProcessorTime()
    assert waiting.watch(lambda calls: time.sleep(0.1) or calls)(3) == 3
    working.watch(lambda _: spin(0.1))(1)
    assert waiting.share < 0.2
    assert working.processor_seconds == pytest.approx(0.1, rel=0.2)
    assert working.seconds >= working.processor_seconds


def test_without_samples_nothing_is_wrong():
    assert ProcessorTime().share == 1


@pytest.fixture
def busy():
    """Processes that compete for every core."""
    load = [multiprocessing.Process(target=spin, args=(600,), daemon=True) for _ in range(4 * os.cpu_count())]
    for process in load:
        process.start()
    yield
    for process in load:
        process.kill()
        process.join()


def test_under_load_the_output_warns_and_the_file_has_the_share(bench, busy, tmp_path):
    arguments = ["--only", "bn/eval/float32/8x16", "--seconds", "0.5", "--stock-allocator", "--out", "busy.json"]
    shown = " ".join(bench(*arguments, "--quiet").stdout.split())
    assert "Warning: the machine was busy, and these times can't be trusted. In the only case" in shown
    assert "load average at the start" in shown
    assert json.loads((tmp_path / "busy.json").read_text())["results"][0]["processor_share"] < 0.9
    assert "Warning: the machine was busy" in bench("--table", "busy.json").stdout
    done = bench(*arguments, "--json")
    assert "Warning: the machine was busy" in done.stderr
    assert json.loads(done.stdout)


def test_the_share_of_every_case_is_judged(bench, tmp_path):
    bench("--only", "bn/eval/float32/(8x16|32x64)", "--seconds", "0", "--quiet", "--out", "run.json")
    content = json.loads((tmp_path / "run.json").read_text())

    def note(*shares):
        for result, share in zip(content["results"], shares, strict=True):
            result["processor_share"] = share
        (tmp_path / "run.json").write_text(json.dumps(content))
        return busy_note(read(tmp_path / "run.json"))

    assert note(0.95, 1.0) is None
    assert "In 1 of 2 cases the timing thread had a processor for less than 90% of the time, at worst for 41%" in note(
        0.41, 1.0
    )
    assert note(None, None) is None  # a file of an earlier version
