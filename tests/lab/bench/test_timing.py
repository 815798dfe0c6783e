import gc

import pytest

from batchnorm.lab.bench.timing import Quartiles, interleaved, quartiles, ratios, sampler


class Clock:
    """Tells the time that the calls have taken, and writes down whose they were."""

    def __init__(self):
        self.now, self.made = 0.0, []

    def __call__(self):
        return self.now

    def lasting(self, name, seconds):
        def call():
            self.made.append(name)
            self.now += seconds

        return call


def test_a_sample_is_the_seconds_of_one_call():
    clock = Clock()
    assert sampler(clock.lasting("ours", 0.25), clock)(4) == 0.25
    assert clock.made == ["ours"] * 4


def test_the_sides_follow_each_other_and_every_other_round_turns_them_round():
    clock = Clock()
    sides = {name: sampler(clock.lasting(name, 1.0), clock) for name in ("ours", "torch", "copy")}
    times = interleaved(sides, 0, rounds=3, clock=clock)
    assert times == {"ours": [1.0] * 3, "torch": [1.0] * 3, "copy": [1.0] * 3}
    assert clock.made[-9:] == ["ours", "torch", "copy", "copy", "torch", "ours", "ours", "torch", "copy"]


def test_rounds_go_on_until_the_time_is_used_up():
    clock = Clock()
    times = interleaved({"ours": sampler(clock.lasting("ours", 1.0), clock)}, 9.5, rounds=3, clock=clock)
    assert len(times["ours"]) == 10


def test_a_call_too_short_for_the_clock_is_repeated_for_at_least_2_ms():
    clock = Clock()
    interleaved({"ours": sampler(clock.lasting("ours", 30e-6), clock)}, 0, rounds=1, clock=clock)
    in_a_sample = len(clock.made)
    clock.made.clear()
    interleaved({"ours": sampler(clock.lasting("ours", 30e-6), clock)}, 0, rounds=2, clock=clock)
    assert 2e-3 <= (len(clock.made) - in_a_sample) * 30e-6 <= 4e-3


def test_the_garbage_collector_is_off_while_timing_and_on_again_after_an_error():
    seen = []

    def call():
        seen.append(gc.isenabled())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleaved({"ours": sampler(call)}, 0)
    assert seen == [False]
    assert gc.isenabled()


def test_the_ratio_is_the_median_over_the_rounds_and_not_the_ratio_of_medians():
    ours, torch = [1.0, 10.0, 2.0], [3.0, 10.0, 8.0]  # ratios 3, 1, 4; medians 2 and 8
    assert quartiles(ratios(torch, ours)) == Quartiles(median=3.0, low=2.0, high=3.5)
