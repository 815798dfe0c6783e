"""docs/scale.md shows the committed measurement, and its simulated figures are those of the model it states."""

import importlib
import math
import sys

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm as bn
from support import ROOT, benchmark_results

PAGE = (ROOT / "docs/scale.md").read_text()
TEXT = " ".join(PAGE.split())
RANKS = (2, 4, 8, 64)


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])  # for the processes it starts, too
        yield importlib.import_module("collectives")


@pytest.fixture(scope="module")
def content():
    return benchmark_results("collectives")


def ring_all_gather(ranks):
    """Messages in turn and vectors received by rank 0, by passing on what came last until all have all."""
    held, last, turns = [{rank} for rank in range(ranks)], list(range(ranks)), 0
    while any(len(have) < ranks for have in held):
        last = [last[rank - 1] for rank in range(ranks)]
        for have, new in zip(held, last, strict=True):
            have.add(new)
        turns += 1
    return turns, len(held[0]) - 1


def doubling_all_gather(ranks):
    """The same, by exchanging all that is held with the rank at distance 1, 2, 4, ..."""
    held, turns = [{rank} for rank in range(ranks)], 0
    while len(held[0]) < ranks:
        held = [held[rank] | held[rank ^ 2**turns] for rank in range(ranks)]
        turns += 1
    return turns, len(held[0]) - 1


@pytest.mark.parametrize("ranks", RANKS)
def test_an_all_gather_needs_the_messages_that_passing_them_on_takes(script, ranks):
    assert script.factors("all_gather", "ring", ranks) == ring_all_gather(ranks)
    assert script.factors("all_gather", "doubling", ranks) == doubling_all_gather(ranks)


@pytest.mark.parametrize("ranks", RANKS)
def test_an_all_reduce_is_two_rounds_of_a_ring_or_doubling_of_whole_vectors(script, ranks):
    turns, _ = ring_all_gather(ranks)
    assert script.factors("all_reduce", "ring", ranks) == (2 * turns, pytest.approx(2 * turns / ranks))
    turns, _ = doubling_all_gather(ranks)
    assert script.factors("all_reduce", "doubling", ranks) == (turns, turns)


def test_costs_of_known_cases(script):
    ring, doubling = (script.Cost(name, 10.0, 0.5) for name in ("ring", "doubling"))
    assert ring.seconds("all_gather", 4, 100) == 3 * (10 + 50)
    assert ring.seconds("all_reduce", 4, 100) == 6 * (10 + 12.5)
    assert doubling.seconds("all_gather", 4, 100) == 2 * 10 + 3 * 50
    assert doubling.seconds("all_reduce", 4, 100) == 2 * (10 + 50)
    assert ring.seconds("all_gather", 1, 100) == doubling.seconds("all_reduce", 1, 100) == 0


@pytest.mark.parametrize("algorithm", ["ring", "doubling"])
@pytest.mark.parametrize("collective", ["all_gather", "all_reduce"])
def test_the_fit_finds_the_alpha_and_beta_that_times_were_made_of(script, collective, algorithm):
    true = script.Cost(algorithm, 25e-6, 0.32e-9)
    samples = [
        {"ranks": ranks, "bytes": size, "microseconds": {"median": 1e6 * true.seconds(collective, ranks, size)}}
        for ranks in (2, 4, 8)
        for size in (1_040, 32_784, 1_048_592)
    ]
    found, errors = script.fit(collective, algorithm, samples)
    # Columns are scaled to 1, where they are far from parallel: a few hundred roundings of 1e-16.
    assert (found.alpha, found.beta) == (pytest.approx(true.alpha, rel=1e-12), pytest.approx(true.beta, rel=1e-12))
    assert max(map(abs, errors)) < 1e-12


def test_of_disturbed_times_no_cost_nearby_has_smaller_relative_errors(script):
    true = script.Cost("ring", 25e-6, 0.32e-9)
    samples = [
        {
            "ranks": ranks,
            "bytes": size,
            "microseconds": {"median": factor * true.seconds("all_reduce", ranks, size) * 1e6},
        }
        for ranks in (2, 4, 8)
        for size, factor in ((1_040, 1.3), (32_784, 0.8), (1_048_592, 1.1))
    ]

    def squares(cost):
        times = [
            (cost.seconds("all_reduce", s["ranks"], s["bytes"]), s["microseconds"]["median"] / 1e6) for s in samples
        ]
        return sum((model / time - 1) ** 2 for model, time in times)

    found, errors = script.fit("all_reduce", "ring", samples)
    assert squares(found) == pytest.approx(sum(error**2 for error in errors))
    for a, b in ((1.01, 1), (0.99, 1), (1, 1.01), (1, 0.99), (1.01, 0.99), (0.99, 1.01)):
        assert squares(script.Cost("ring", a * found.alpha, b * found.beta)) > squares(found)


def test_times_that_fall_with_size_give_a_beta_of_0_and_not_less(script):
    samples = [{"ranks": 2, "bytes": size, "microseconds": {"median": 1e4 / size}} for size in (100, 200)]
    found, _ = script.fit("all_gather", "ring", samples)
    assert found.beta == 0
    assert found.alpha > 0


class Sent(TorchDispatchMode):
    """Names and bytes of the collectives that are called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "_c10d_functional" and function._opname != "wait_tensor":
            self.calls.append((function._opname, args[0].nbytes))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_sends_what_the_page_says(script, dtype):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        layer = bn.BatchNorm2d(5, sync=True)
        layer.step_state.ranks_agreed = True  # the first batch's exchange of names
        with Sent() as sent:
            layer(torch.randn(2, 5, 3, 3, dtype=dtype, requires_grad=True)).sum().backward()
    finally:
        dist.destroy_process_group()
    gathered, summed = (script.message(collective, 5) for collective in script.COLLECTIVES)
    assert sent.calls == [("all_gather_into_tensor", gathered), ("all_reduce", summed)]
    assert (gathered, summed) == (16 * 5 + 16, 16 * 5)
    assert "16C + 16 bytes" in TEXT
    assert "16C bytes" in TEXT


def test_the_networks_have_the_layers_and_parameters_that_are_known_of_them(script):
    assert [(len(layers), 2 * sum(layers)) for layers in script.NETWORKS.values()] == [(53, 53_120), (52, 34_112)]


def test_the_tables_of_the_page_are_those_of_the_committed_file(script, content):
    tables = script.tables(content)
    assert len(tables) == 5
    for table in tables.values():
        assert table in PAGE
    assert script.fill_page(PAGE, content) == PAGE


def test_the_fits_of_the_file_are_those_of_its_samples(script, content):
    for row in content["fits"]:
        samples = [s for s in content["samples"] if s["collective"] == row["collective"] and s["ranks"] in row["ranks"]]
        assert len(samples) == len(script.CHANNELS) * len(row["ranks"])
        found, errors = script.fit(row["collective"], row["algorithm"], samples)
        # nnls on another machine: roundings of 1e-16, times the condition of two columns
        assert (found.alpha, found.beta) == (pytest.approx(row["alpha"]), pytest.approx(row["beta"]))
        assert max(map(abs, errors)) == pytest.approx(row["worst"])


def test_the_model_gives_the_simulated_figures_of_the_file(script, content):
    assert [row["ranks"] for row in content["simulated"]] == 2 * [2**k for k in range(1, 13)]
    for row, again in zip(content["simulated"], script.simulated(content), strict=True):
        assert again["bytes"] == row["bytes"]
        assert again["milliseconds"] == pytest.approx(row["milliseconds"])
    (row,) = [r for r in content["simulated"] if (r["network"], r["ranks"]) == ("ResNet-50", 8)]
    layers, channels = 53, 26_560
    sent = 16 * (channels + layers)
    summed = 16 * channels
    assert row["bytes"] == 7 * sent + 1.75 * summed
    ring = 7 * (layers * 5e-6 + sent * 1e-10) + 14 * (layers * 5e-6 + summed / 8 * 1e-10)
    doubling = 3 * layers * 25e-6 + 7 * sent * 0.32e-9 + 3 * (layers * 25e-6 + summed * 0.32e-9)
    assert row["milliseconds"]["5 µs, 10 GB/s, ring"] == pytest.approx(1e3 * ring)
    assert row["milliseconds"]["25 µs, 25 Gbit/s, doubling"] == pytest.approx(1e3 * doubling)


def test_the_largest_number_of_ranks_is_the_last_within_the_budget(script):
    layers, costs = [64], dict.fromkeys(script.COLLECTIVES, script.Cost("ring", 1.0, 0.0))  # 3 (p - 1) seconds
    assert [script.largest(layers, budget, costs) for budget in (2, 3, 20, 21, 1e9)] == [1, 2, 4, 8, 4096]


def test_what_the_page_says_of_bytes_and_crossovers_is_the_models(script):
    layers = script.NETWORKS["ResNet-50"]
    for collective, way in (("all_gather", "forward"), ("all_reduce", "backward")):
        assert f"{sum(script.message(collective, channels) for channels in layers):,} bytes {way}" in TEXT
    assert f"{script.received(layers, 4096) / 1e9:.1f} GB per step" in TEXT
    sizes = [alpha / beta for alpha, beta in script.ASSUMED.values()]
    assert "{:,.0f} and {:,.0f} bytes".format(*sizes) in TEXT
    channels = [int((size - 16) / 16) for size in sizes]
    assert "{:,} and {:,} channels".format(*channels) in TEXT
    assert max(layers) < min(channels)
    overtaken = [sizes[0] * math.log2(ranks) / (ranks - 1) for ranks in (16, 32)]
    assert overtaken[0] > script.message("all_gather", 512) > overtaken[1]
    assert "between 16 and 32 ranks" in TEXT
    assert [round(100 / math.sqrt(count)) for count in (32, 256)] == [18, 6]
    assert "32 has an error of 18% of their standard deviation, of 256 6%" in TEXT


def test_the_share_formula_of_the_page_is_where_a_ring_takes_that_share(script):
    layers, step, share = script.NETWORKS["ResNet-50"], 1.0, 0.1
    cost = script.Cost("ring", 5e-6, 1e-10)
    size = sum(script.message("all_gather", channels) for channels in layers)
    ranks = 1 + share * step / (3 * len(layers) * cost.alpha + size * cost.beta)
    taken = script.simulate(layers, ranks, dict.fromkeys(script.COLLECTIVES, cost))
    # What the formula leaves out: twice the bytes of the all_reduce, 85 µs of 100 ms.
    assert taken == pytest.approx(share * step, rel=1e-3)


def test_what_the_page_says_of_the_measurement_holds(content):
    assert list(content["seconds"]) == ["2", "4", "8"]
    assert content["command"] in PAGE
    assert f"{content['machine']['cores']} cores" in TEXT
    for collective in ("all_gather", "all_reduce"):
        ring, doubling = (
            next(
                row["typical"]
                for row in content["fits"]
                if (row["collective"], row["algorithm"], row["ranks"]) == (collective, algorithm, [2, 4, 8])
            )
            for algorithm in ("ring", "doubling")
        )
        assert 0.3 < ring < doubling  # none fits, and the ring is the nearer
    small = [s["microseconds"] for s in content["samples"] if s["ranks"] == 2 and s["bytes"] < 10_000]
    assert all(times["mean"] > 1.2 * times["median"] for times in small)  # the few that wait for a core


def test_simulated_figures_are_called_simulated():
    for mark in ("<!-- simulated -->", "<!-- largest -->"):
        assert "**simulated**" in PAGE.partition(mark)[0].rsplit("\n\n", 2)[1]
    for network in ("alpha 5 µs and 10 GB/s", "alpha 25 µs and 25 Gbit/s"):
        assert network in TEXT.partition("**assume**")[2]


def test_two_processes_can_be_timed_anew(script):
    spans = script.timed(2, 0.1)
    assert len(spans) == len(script.COLLECTIVES) * len(script.CHANNELS) + len(script.NETWORKS)
    assert all(values and min(values) > 0 for values in spans.values())
