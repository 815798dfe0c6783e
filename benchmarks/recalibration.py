"""What recalibration costs beside the forward passes that it takes: python benchmarks/recalibration.py.

Writes benchmarks/results/recalibration.json and prints its table as Markdown. A network of three blocks of convolution,
batch normalization and ReLU, 64 channels each, reads batches of 64 images of 32 x 32 in float32. What is compared takes
turns in one process; a number is the median, over the rounds, of the time of a pass of `recalibrate` over the time of
the same forward passes in eval mode, without gradients. The pass layer by layer is the longest, that of the last layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.bench.machine import describe
from batchnorm.bench.timing import interleaved, ratios, sampler, summary

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/recalibration.json"
SECONDS = 20.0
BATCHES, SAMPLES, CHANNELS, SIZE = 2, 64, 64, 32
LAYERS = ("ours", "torch")


def _network(kind: type[nn.BatchNorm2d]) -> nn.Sequential:
    """Training, as recalibration finds it."""
    blocks: list[nn.Module] = []
    for inputs in (3, CHANNELS, CHANNELS):
        blocks += [nn.Conv2d(inputs, CHANNELS, 3, padding=1, bias=False), kind(CHANNELS), nn.ReLU()]
    return nn.Sequential(*blocks)


def _passes(kind: type[nn.BatchNorm2d], batches: list[Tensor]) -> dict[str, Callable[[], object]]:
    """The pass of eval, and those of recalibration."""
    evaluated, all_layers, last_layer = (_network(kind) for _ in range(3))
    evaluated.eval()
    for layer in list(last_layer.modules())[1:-2]:
        if isinstance(layer, bn.BatchNorm2d):
            bn.freeze(layer)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.eval()

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            evaluated(batch)

    return {
        "forward": forward,
        "at once": lambda: bn.recalibrate(all_layers, batches, mode="at_once"),
        "layer by layer": lambda: bn.recalibrate(last_layer, batches),
    }


def measure() -> dict[str, Any]:
    """Times of the passes, with our layers and with torch's."""
    bn.tune_allocator()
    batches = [torch.randn(SAMPLES, 3, SIZE, SIZE) for _ in range(BATCHES)]
    results = []
    for name, kind in zip(LAYERS, (bn.BatchNorm2d, nn.BatchNorm2d), strict=True):
        times = interleaved({key: sampler(call) for key, call in _passes(kind, batches).items()}, SECONDS)
        forward = times.pop("forward")
        results.append(
            {
                "layers": name,
                "forward_milliseconds": 1e3 * summary(forward)["median"],
                "rounds": len(forward),
                "ratios": {key: summary(ratios(values, forward)) for key, values in times.items()},
            }
        )
    return {
        "command": "python benchmarks/recalibration.py",
        "machine": describe(allocator="tuned"),
        "batches": BATCHES,
        "shape": [SAMPLES, CHANNELS, SIZE, SIZE],
        "seconds": SECONDS,
        "results": results,
    }


def table(content: dict[str, Any]) -> str:
    """The ratios as Markdown, with quartiles."""
    lines = ["| layers | forward, ms | at once | layer by layer |", "| --- | ---: | ---: | ---: |"]
    for row in content["results"]:
        cells = [f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" for ratio in row["ratios"].values()]
        lines.append(f"| {row['layers']} | {row['forward_milliseconds']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if bn.kernels().cpu.name != "native":
        raise SystemExit(f"the native kernels must run; got {bn.kernels().cpu}")
    content = measure()
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content), end="")  # noqa: T201
