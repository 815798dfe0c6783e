"""Cost of synchronized statistics, measured and simulated: python benchmarks/collectives.py.

The script times all_gather and all_reduce between 2, 4 and 8 gloo processes on this machine, one thread each, for
vectors of the sizes that a synchronized layer sends. It fits the alpha-beta model, and simulates 2 to 4096 ranks with
the measured parameters and with assumed ones. It writes benchmarks/results/collectives.json, prints its tables as
Markdown, and puts them into docs/scale.md. This takes two minutes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls
from torch import multiprocessing

from batchnorm.errors import RunError
from batchnorm.lab.bench.markdown import replace_table
from batchnorm.lab.bench.timing import paused_gc, quartiles
from batchnorm.lab.machine import describe

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/collectives.json"
PAGE = ROOT / "docs/scale.md"

SIMULATED = tuple(2**k for k in range(1, 13))
CHANNELS = (64, 256, 1024, 2048, 8192, 32768, 65536)
COLLECTIVES = ("all_gather", "all_reduce")
ALGORITHMS = ("ring", "doubling")
SECONDS = {2: 10.0, 4: 25.0, 8: 50.0}
PATIENCE = 90.0
STEPS = (0.1, 0.4)
SHARE = 0.1


def _resnet50() -> list[int]:
    channels = [64]
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        channels += [4 * width, *(blocks * [width, width, 4 * width])]
    return channels


def _mobilenetv2() -> list[int]:
    channels, width = [32, 32, 16], 16
    for out, blocks in ((24, 2), (32, 3), (64, 4), (96, 3), (160, 3), (320, 1)):
        for _ in range(blocks):
            channels += [6 * width, 6 * width, out]
            width = out
    return [*channels, 1280]


ASSUMED = {"5 µs, 10 GB/s": (5e-6, 1 / 10e9), "25 µs, 25 Gbit/s": (25e-6, 8 / 25e9)}
"""Alpha and beta of networks that were not measured."""

NETWORKS = {"ResNet-50": _resnet50(), "MobileNetV2": _mobilenetv2()}
"""Channels of each batch normalization layer, by model."""


@dataclass(frozen=True)
class Cost:
    """The cost of a collective: its algorithm, the seconds per message (alpha) and the seconds per byte (beta)."""

    algorithm: str
    alpha: float
    beta: float

    def seconds(self, collective: str, ranks: int, size: int) -> float:
        """Return the seconds of one call in which each rank sends a vector of ``size`` bytes."""
        messages, vectors = factors(collective, self.algorithm, ranks)
        return messages * self.alpha + vectors * size * self.beta


Costs = dict[str, Cost]
"""The cost of each collective."""


def factors(collective: str, algorithm: str, ranks: int) -> tuple[float, float]:
    """Return the factors of alpha and of size x beta: successive messages, and vectors that pass through a rank.

    Thakur, Rabenseifner & Gropp (2005); the number of ranks is a power of two.
    """
    rounds = math.log2(ranks)
    return {
        ("all_gather", "ring"): (ranks - 1, ranks - 1),
        ("all_gather", "doubling"): (rounds, ranks - 1),
        ("all_reduce", "ring"): (2 * (ranks - 1), 2 * (ranks - 1) / ranks),
        ("all_reduce", "doubling"): (rounds, rounds),
    }[collective, algorithm]


def message(collective: str, channels: int) -> int:
    """Return the bytes that a rank sends for a layer, in float64.

    The all_gather takes the mean, the variance and two counts, the all_reduce the sums of dz and of dz * x_hat.
    """
    return 8 * (2 * channels + 2 if collective == "all_gather" else 2 * channels)


def received(layers: Iterable[int], ranks: int) -> float:
    """Return the bytes that a rank receives per step in a ring."""
    return sum(factors(name, "ring", ranks)[1] * message(name, channels) for channels in layers for name in COLLECTIVES)


def simulate(layers: Iterable[int], ranks: int, costs: Costs) -> float:
    """Return the seconds per step for the statistics of all layers, one after the other, forward and backward."""
    return sum(costs[name].seconds(name, ranks, message(name, channels)) for channels in layers for name in COLLECTIVES)


def largest(layers: Iterable[int], budget: float, costs: Costs) -> int:
    """Return the largest simulated number of ranks whose statistics stay within a budget per step; 1 if none does."""
    layers = list(layers)
    return max((ranks for ranks in SIMULATED if simulate(layers, ranks, costs) <= budget), default=1)


def fit(collective: str, algorithm: str, samples: list[dict[str, Any]]) -> tuple[Cost, list[float]]:
    """Return the cost fitted to the samples by least squares of relative errors, and the relative error of each."""
    seconds = np.array([sample["microseconds"]["median"] / 1e6 for sample in samples])
    rows = [
        (messages, vectors * sample["bytes"])
        for sample in samples
        for messages, vectors in [factors(collective, algorithm, sample["ranks"])]
    ]
    matrix = np.array(rows) / seconds[:, None]
    scale = matrix.max(axis=0)
    found, _ = nnls(matrix / scale, np.ones(len(seconds)))
    alpha, beta = (found / scale).tolist()
    return Cost(algorithm, alpha, beta), (matrix @ [alpha, beta] - 1).tolist()


def _calls(ranks: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Return the calls to time, by name, and their number per round; the collectives are those of the layer."""
    group = dist.group.WORLD.group_name
    collectives = torch.ops._c10d_functional

    def gather(channels: int) -> Callable[[], object]:
        packed = torch.ones(1, message("all_gather", channels) // 8, dtype=torch.float64)
        return lambda: collectives.wait_tensor(collectives.all_gather_into_tensor(packed, ranks, group))

    def reduce(channels: int) -> Callable[[], object]:
        sums = torch.ones(message("all_reduce", channels) // 8, dtype=torch.float64)
        return lambda: collectives.wait_tensor(collectives.all_reduce(sums, "sum", group))

    def step(layers: list[int]) -> Callable[[], object]:
        calls = [gather(channels) for channels in layers] + [reduce(channels) for channels in reversed(layers)]
        return lambda: [call() for call in calls]

    calls = {}
    for channels in CHANNELS:
        often = 10 if channels <= 2048 else 2
        calls[f"all_gather {channels}"] = gather(channels), often
        calls[f"all_reduce {channels}"] = reduce(channels), often
    return calls | {name: (step(layers), 1) for name, layers in NETWORKS.items()}


def _rank(rank: int, ranks: int, folder: str, seconds: float) -> None:
    """Make the calls in one process until the time is used up; rank 0 writes their durations."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=PATIENCE))
    calls = _calls(ranks)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    with paused_gc():
        end = math.inf
        more = torch.ones(1)
        while more:
            for name, (call, often) in calls.items():
                for _ in range(often):
                    started = time.perf_counter()
                    call()
                    times[name].append((started, time.perf_counter()))
            if end == math.inf:  # the first round warms up
                end = time.perf_counter() + seconds
                times = {name: [] for name in calls}
            elif rank == 0:
                more.fill_(time.perf_counter() < end)
            dist.broadcast(more, 0)
    spans = {name: _spans(torch.tensor(values, dtype=torch.float64), ranks) for name, values in times.items()}
    if rank == 0:
        Path(folder, "spans.json").write_text(json.dumps(spans))
    dist.destroy_process_group()


def _spans(times: torch.Tensor, ranks: int) -> list[float]:
    """Return the seconds of each call, from the arrival of the last rank to the end of the last (system clock)."""
    of_all = [torch.empty_like(times) for _ in range(ranks)]
    dist.all_gather(of_all, times)
    started, ended = torch.stack(of_all).amax(0).unbind(1)
    return (ended - started).tolist()


def timed(ranks: int, seconds: float) -> dict[str, list[float]]:
    """Return the seconds of each call between a number of processes.

    Raises
    ------
    RunError
        A process did not end in time.
    """
    with TemporaryDirectory() as folder:
        processes = multiprocessing.spawn(_rank, (ranks, folder, seconds), ranks, join=False, daemon=True)
        deadline = time.monotonic() + seconds + PATIENCE
        while not processes.join(timeout=1.0):
            if time.monotonic() > deadline:
                for process in processes.processes:
                    process.kill()
                raise RunError(f"{ranks} processes must end within {seconds + PATIENCE:.0f} s; some have not")
        return json.loads(Path(folder, "spans.json").read_text())


def _samples(spans: dict[int, dict[str, list[float]]]) -> Iterator[dict[str, Any]]:
    for ranks, calls in spans.items():
        for collective in COLLECTIVES:
            for channels in CHANNELS:
                seconds = calls[f"{collective} {channels}"]
                yield {
                    "ranks": ranks,
                    "collective": collective,
                    "channels": channels,
                    "bytes": message(collective, channels),
                    "calls": len(seconds),
                    "microseconds": {
                        **asdict(quartiles([1e6 * value for value in seconds])),
                        "mean": 1e6 * mean(seconds),
                    },
                }


def _fits(samples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Fit each number of processes by itself, and all of them together by either algorithm."""
    counts = sorted({sample["ranks"] for sample in samples})
    for collective in COLLECTIVES:
        for kept, algorithm in [*(([ranks], "ring") for ranks in counts), *((counts, name) for name in ALGORITHMS)]:
            chosen = [s for s in samples if s["collective"] == collective and s["ranks"] in kept]
            cost, errors = fit(collective, algorithm, chosen)
            typical, worst = math.sqrt(sum(error**2 for error in errors) / len(errors)), max(map(abs, errors))
            yield {"collective": collective, "ranks": kept} | asdict(cost) | {"typical": typical, "worst": worst}


def measured_costs(content: dict[str, Any], ranks: int) -> Costs:
    """Return the costs fitted for a number of processes."""
    return {
        row["collective"]: Cost(row["algorithm"], row["alpha"], row["beta"])
        for row in content["fits"]
        if row["ranks"] == [ranks]
    }


def columns(content: dict[str, Any]) -> dict[str, Costs]:
    """Return the costs to simulate, by name: those measured with 2 processes, then the assumed ones."""
    assumed = {
        f"{name}, {algorithm}": dict.fromkeys(COLLECTIVES, Cost(algorithm, alpha, beta))
        for name, (alpha, beta) in content["assumed"].items()
        for algorithm in ALGORITHMS
    }
    return {"measured here, ring": measured_costs(content, 2)} | assumed


def _steps(spans: dict[int, dict[str, list[float]]]) -> Iterator[dict[str, Any]]:
    for network in NETWORKS:
        for ranks, calls in spans.items():
            seconds = calls[network]
            yield {
                "network": network,
                "ranks": ranks,
                "steps": len(seconds),
                "milliseconds": asdict(quartiles([1e3 * value for value in seconds])),
            }


def measure(seconds: dict[int, float]) -> dict[str, Any]:
    """Measure with each number of processes for the seconds given, fit and simulate."""
    machine = asdict(describe(allocator="as it is"))  # before its own processes are the load
    spans = {ranks: timed(ranks, limit) for ranks, limit in seconds.items()}
    samples = list(_samples(spans))
    content = {
        "command": "python benchmarks/collectives.py",
        "machine": machine | {"threads": 1, "backend": "gloo"},
        "seconds": {str(ranks): limit for ranks, limit in seconds.items()},
        "samples": samples,
        "fits": list(_fits(samples)),
        "steps": list(_steps(spans)),
        "assumed": ASSUMED,
    }
    return content | {"simulated": simulated(content)}


def simulated(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the milliseconds per step that the model gives for each network, number of ranks and column."""
    return [
        {
            "network": network,
            "ranks": ranks,
            "bytes": round(received(layers, ranks)),
            "milliseconds": {name: 1e3 * simulate(layers, ranks, costs) for name, costs in columns(content).items()},
        }
        for network, layers in NETWORKS.items()
        for ranks in SIMULATED
    ]


def _figure(value: float) -> str:
    """Format a number with three digits and no exponent."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def _spread(values: dict[str, float]) -> str:
    return f"{_figure(values['median'])} ({_figure(values['low'])} to {_figure(values['high'])})"


def _table(head: list[str], rows: Iterable[list[str]], words: int = 1) -> str:
    """Return a table in Markdown, whose first columns are words and whose others are numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows]) + "\n"


def _measured_table(content: dict[str, Any]) -> str:
    times: dict[tuple[str, int], list[str]] = {}
    for sample in content["samples"]:
        cells = times.setdefault((sample["collective"], sample["bytes"]), [f"{sample['channels']:,}"])
        cells.append(_spread(sample["microseconds"]))
    counts = [f"{ranks} processes, µs" for ranks in content["seconds"]]
    rows = [[name, cells[0], f"{size:,}", *cells[1:]] for (name, size), cells in times.items()]
    return _table(["collective", "C", "bytes", *counts], rows)


def _fits_table(content: dict[str, Any]) -> str:
    rows = [
        [
            fit["collective"],
            fit["algorithm"],
            ", ".join(map(str, fit["ranks"])),
            _figure(1e6 * fit["alpha"]),
            _figure(1e9 * fit["beta"]),
            f"{fit['typical']:.0%}",
            f"{fit['worst']:.0%}",
        ]
        for fit in content["fits"]
    ]
    return _table(["collective", "model", "processes", "alpha, µs", "beta, ns", "residual", "largest"], rows, 2)


def _steps_table(content: dict[str, Any]) -> str:
    rows = []
    for step in content["steps"]:
        layers, ranks = NETWORKS[step["network"]], step["ranks"]
        own, two = (1e3 * simulate(layers, ranks, measured_costs(content, count)) for count in (ranks, 2))
        rows.append([step["network"], str(ranks), _spread(step["milliseconds"]), _figure(own), _figure(two)])
    return _table(["network", "processes", "measured, ms", "model, own fit", "model, fit of 2"], rows)


def _simulated_table(content: dict[str, Any], network: str) -> str:
    rows = [
        [f"{row['ranks']:,}", _figure(row["bytes"] / 1e6), *map(_figure, row["milliseconds"].values())]
        for row in content["simulated"]
        if row["network"] == network
    ]
    return _table(["ranks", "MB", *columns(content)], rows, 0)


def _largest_table(content: dict[str, Any]) -> str:
    rows = [
        [network, f"{1e3 * step:.0f} ms"]
        + [f"{largest(layers, SHARE * step, costs):,}" for costs in columns(content).values()]
        for network, layers in NETWORKS.items()
        for step in STEPS
    ]
    return _table(["network", "step, assumed", *columns(content)], rows)


def tables(content: dict[str, Any]) -> dict[str, str]:
    """Return the tables of the page by name, as Markdown."""
    return {
        "measured": _measured_table(content),
        "fits": _fits_table(content),
        "steps": _steps_table(content),
        "simulated": _simulated_table(content, "ResNet-50"),
        "largest": _largest_table(content),
    }


def fill_page(page: str, content: dict[str, Any]) -> str:
    """Return the page with each table between its marks."""
    for name, table in tables(content).items():
        page = replace_table(page, name, table)
    return page


if __name__ == "__main__":
    content = measure(SECONDS)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    PAGE.write_text(fill_page(PAGE.read_text(), content))
    print("\n".join(tables(content).values()), end="")  # noqa: T201
