"""Time recalibration against the forward passes that it needs: python benchmarks/recalibration.py.

It writes benchmarks/results/recalibration.json and puts its table into docs/statistics.md. There are three networks,
each with three layers of batch normalization, of ours or of torch's. The calls that are compared take turns in one
process. A number is the median, over the rounds, of the time of `recalibrate` divided by the time of the same forward
passes in eval mode without gradients: one through the whole network for ``mode="at_once"``; for ``mode="layerwise"``
one through the whole network and one up to each of the other layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn
from batchnorm.lab.bench.markdown import replace_table
from batchnorm.lab.bench.timing import interleaved, quartiles, ratios, sampler
from batchnorm.lab.machine import describe

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/recalibration.json"
PAGE = ROOT / "docs/statistics.md"
SECONDS = 10.0
CHANNELS, WIDTH = 64, 512
LAYERS = ("ours", "torch")
# Name, shape of a batch, and number of samples.
NETWORKS = {
    "convolutions, 64 channels": ((32, 3, 32, 32), 1024),
    "512 wide, 256 rows": ((256, WIDTH), 8192),
    "512 wide, 32 rows": ((32, WIDTH), 8192),
}


def _network(shape: tuple[int, ...], layers: str) -> nn.Sequential:
    """Return a network in training mode."""
    blocks: list[nn.Module] = []
    for number in range(3):
        if len(shape) == 4:
            blocks.append(nn.Conv2d(CHANNELS if number else shape[1], CHANNELS, 3, padding=1, bias=False))
            blocks.append({"ours": bn.BatchNorm2d, "torch": nn.BatchNorm2d}[layers](CHANNELS))
        else:
            blocks.append(nn.Linear(WIDTH, WIDTH, bias=False))
            blocks.append({"ours": bn.BatchNorm1d, "torch": nn.BatchNorm1d}[layers](WIDTH))
        blocks.append(nn.ReLU())
    return nn.Sequential(*blocks)


def _sides(shape: tuple[int, ...], layers: str, batches: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Return calls of both modes, and calls of the forward passes that each needs."""
    evaluated, measured = _network(shape, layers).eval(), _network(shape, layers)
    norms = [i for i, module in enumerate(evaluated) if isinstance(module, _BatchNorm)]
    parts = [evaluated, *(evaluated[:i] for i in norms[1:])]

    @torch.no_grad()
    def forward(parts: list[nn.Sequential]) -> None:
        for part in parts:
            for batch in batches:
                part(batch)

    return {
        "at once": lambda: bn.recalibrate(measured, batches, mode="at_once"),
        "at once, forward": lambda: forward(parts[:1]),
        "layer by layer": lambda: bn.recalibrate(measured, batches),
        "layer by layer, forward": lambda: forward(parts),
    }


def measure() -> dict[str, Any]:
    """Return the times of both modes divided by those of their forward passes, by network and layers."""
    bn.tune_allocator()
    results = []
    for name, (shape, samples) in NETWORKS.items():
        batches = list(torch.randn(samples, *shape[1:]).split(shape[0]))
        for layers in LAYERS:
            sides = _sides(shape, layers, batches)
            times = interleaved({key: sampler(call) for key, call in sides.items()}, SECONDS)
            results.append(
                {
                    "network": name,
                    "shape": list(shape),
                    "samples": samples,
                    "layers": layers,
                    "forward_milliseconds": 1e3 * quartiles(times["at once, forward"]).median,
                    "rounds": len(times["at once"]),
                    "ratios": {
                        mode: asdict(quartiles(ratios(times[mode], times[f"{mode}, forward"])))
                        for mode in ("at once", "layer by layer")
                    },
                }
            )
    return {
        "command": "python benchmarks/recalibration.py",
        "machine": asdict(describe(allocator="tuned")),
        "seconds": SECONDS,
        "results": results,
    }


def table(content: dict[str, Any]) -> str:
    """Return the ratios as Markdown, with quartiles."""
    lines = ["| network | layers | forward, ms | at once | layer by layer |", "| --- | --- | ---: | ---: | ---: |"]
    for row in content["results"]:
        cells = [f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" for ratio in row["ratios"].values()]
        lines.append(
            f"| {row['network']} | {row['layers']} | {row['forward_milliseconds']:.1f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if bn.kernels().cpu.name != "native":
        raise SystemExit(f"the native kernels must run; got {bn.kernels().cpu}")
    content = measure()
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    PAGE.write_text(replace_table(PAGE.read_text(), RESULTS.name, table(content)))
    print(table(content), end="")  # noqa: T201
