"""Ctrl-C at any moment leaves the model unchanged, and ends a loader that waits at once."""

import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.statistics.interrupts import allow_interrupts, defer_interrupts
from support import randn

HERE = str(Path(bn.__file__).parent / "statistics")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4), nn.Dropout(0.3), nn.BatchNorm1d(4)).train()


def state(model):
    return (
        [values.tolist() for values in model.buffers()],
        [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        [m.track_running_stats for m in (model[1], model[3])],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        signal.getsignal(signal.SIGINT),
    )


def interrupted_at(line, act):
    """Send this process SIGINT before the given line of batchnorm.statistics runs; return whether it was reached."""
    seen = 0

    def local(frame, event, _):
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == line:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename.startswith(HERE) else None)
    try:
        act()
    finally:
        sys.settrace(before)
    return seen >= line


BATCHES = randn(24, 3).split(12)
CALLS = {
    "layerwise": lambda model: bn.recalibrate(model, BATCHES),
    "at once": lambda model: bn.recalibrate(model, BATCHES, mode="at_once"),
    "adapt": lambda model: bn.adapt(model, BATCHES),
    "detect_shift": lambda model: bn.detect_shift(model, BATCHES),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_before_any_line_leaves_everything_as_it_was(name):
    for line in range(1, 5000):
        model = network()
        before = state(model)
        try:
            reached = interrupted_at(line, lambda model=model: CALLS[name](model))
        except KeyboardInterrupt:
            assert state(model) == before, line
        else:
            assert not reached, line  # none is lost
            break
    assert line > 300


def test_an_interrupt_ends_a_loader_that_waits_at_once():
    def slow():
        yield BATCHES[0]
        main = threading.main_thread().ident
        threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        time.sleep(60)
        yield BATCHES[1]

    layer = bn.BatchNorm1d(3)
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        bn.recalibrate(layer, slow())
    assert time.perf_counter() - began < 30
    assert layer.running_mean.tolist() == [0, 0, 0]


def interrupts():
    signal.raise_signal(signal.SIGINT)


def test_a_deferred_interrupt_is_raised_at_the_end_or_where_it_is_allowed():
    done = []

    def work(*, waits):
        with defer_interrupts():
            interrupts()
            done.append("deferred")
            if waits:
                with allow_interrupts():
                    done.append("never")

    for waits in (False, True):
        with pytest.raises(KeyboardInterrupt):
            work(waits=waits)
    assert done == ["deferred"] * 2


def test_a_second_interrupt_does_not_stop_the_cleaning_up_after_the_first():
    done = []

    def work():
        with defer_interrupts():
            try:
                with allow_interrupts():
                    interrupts()
            finally:
                interrupts()
                done.append("cleaned")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["cleaned"]


def test_the_handler_of_a_program_is_called_as_before():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("theirs"))
    try:
        with defer_interrupts():
            interrupts()
            assert seen == []
        assert seen == ["theirs"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_deferred():
    found = []

    def work():
        with defer_interrupts(), allow_interrupts():
            found.append(bn.recalibrate(bn.BatchNorm1d(3), BATCHES).samples)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [24]
