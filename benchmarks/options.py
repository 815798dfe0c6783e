"""Measure the cost of the layer's options: python benchmarks/options.py.

The script writes benchmarks/results/options.json, prints its table as Markdown, and inserts it into docs/layers.md.
Layers with and without an option are timed in turn in one process: forward and backward of batch normalization with
ReLU in float32. A number is the ratio of the time with the option to the time without it, as the median over the
rounds. A virtual batch has a quarter of the samples, and the mask excludes a quarter of the positions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import batchnorm as bn
from batchnorm.lab.bench.markdown import replace_table
from batchnorm.lab.bench.timing import interleaved, quartiles, ratios, sampler
from batchnorm.lab.machine import describe

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/options.json"
PAGE = ROOT / "docs/layers.md"
SECONDS = 1.0
SHAPES = ((64, 64, 56, 56), (64, 256, 28, 28), (4096, 512), (256, 1024), (32, 64))
LAYOUTS = ("contiguous", "channels last")
OPTIONS = ("plain", "propagate", "virtual batches", "renorm", "mask", "accumulate")


def _options(name: str, samples: int) -> dict[str, Any]:
    return {
        "propagate": {"nonfinite": "propagate"},
        "virtual batches": {"virtual_batch_size": samples // 4},
        "renorm": {"renorm": bn.Renorm(3.0, 5.0)},
    }.get(name, {})


def _step(name: str, x: Tensor, dy: Tensor) -> Callable[[], object]:
    """Return a function that runs forward and backward of a layer with the option."""
    layer = bn.BatchNorm(x.shape[1], activation="relu", **_options(name, x.shape[0]))
    x = x.detach().requires_grad_()
    wanted = [x, *layer.parameters()]
    positions = torch.arange(x[:, 0].numel()).view(x[:, 0].shape)
    mask = positions % 4 != 0 if name == "mask" else None

    def step() -> object:
        return torch.autograd.grad(layer(x, mask=mask), wanted, dy)

    def pooled() -> object:
        with bn.accumulate(layer):
            return step()

    return pooled if name == "accumulate" else step


def measure() -> dict[str, Any]:
    """Measure the ratio of the time of a step with each option to that without, for each shape and layout."""
    bn.tune_allocator()
    results = []
    for shape in SHAPES:
        for layout in LAYOUTS[: 2 if len(shape) == 4 else 1]:
            kind = torch.contiguous_format if layout == "contiguous" else torch.channels_last
            x, dy = (torch.randn(shape).contiguous(memory_format=kind) for _ in range(2))
            times = interleaved({name: sampler(_step(name, x, dy)) for name in OPTIONS}, SECONDS)
            results.append(
                {
                    "shape": list(shape),
                    "layout": layout,
                    "microseconds": 1e6 * quartiles(times["plain"]).median,
                    "ratios": {name: asdict(quartiles(ratios(times[name], times["plain"]))) for name in OPTIONS[1:]},
                }
            )
    return {
        "command": "python benchmarks/options.py",
        "machine": asdict(describe(allocator="tuned")),
        "seconds": SECONDS,
        "results": results,
    }


def table(content: dict[str, Any]) -> str:
    """Return the ratios as a Markdown table."""
    lines = [
        f"| shape | layout | plain, µs | {' | '.join(OPTIONS[1:])} |",
        f"| --- | --- | ---: |{' ---: |' * len(OPTIONS[1:])}",
    ]
    lines += [
        f"| {'x'.join(map(str, row['shape']))} | {row['layout']} | {row['microseconds']:.0f} | "
        f"{' | '.join(format(row['ratios'][name]['median'], '.2f') for name in OPTIONS[1:])} |"
        for row in content["results"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if bn.kernels().cpu.name != "native":
        raise SystemExit(f"the native kernels must run; got {bn.kernels().cpu}")
    content = measure()
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    PAGE.write_text(replace_table(PAGE.read_text(), "table", table(content)))
    print(table(content), end="")  # noqa: T201
