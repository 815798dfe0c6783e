"""Measure training steps on batches under 64 KB and on small planes: python benchmarks/small_batches.py.

Writes benchmarks/results/small_batches.json, from which README quotes, and its table into docs/benchmarks.md. A step is
the forward and backward of one layer in float32. Ours and torch's take turns in one process; a ratio is torch's time
over ours, the median over the rounds. "none" has no activation, "relu" has it fused in ours and applied by torch after
its layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.lab.bench.markdown import replace_table
from batchnorm.lab.bench.sides import OURS, STOCK
from batchnorm.lab.bench.timing import interleaved, quartiles, ratios, sampler
from batchnorm.lab.machine import describe

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/small_batches.json"
PAGE = ROOT / "docs/benchmarks.md"
SECONDS = 0.5
SHAPES = (
    *((8, 16), (32, 64), (64, 100), (128, 64)),  # rows
    *((4, 16, 8, 8), (8, 3, 16, 16), (2, 32, 14, 14)),  # images under 64 KB
    *((32, 256, 2), (32, 256, 7), (32, 512, 2, 2), (32, 512, 3, 3), (64, 256, 15)),  # planes of 2 to 15 positions
)


def _steps(shape: tuple[int, ...], activation: str | None) -> dict[str, Callable[[], object]]:
    """Return the training steps of both sides."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    x.requires_grad_()
    ours, stock = OURS[len(shape)](shape[1], activation=activation), STOCK[len(shape)](shape[1])

    def of_ours() -> object:
        return torch.autograd.grad(ours(x), [x, *ours.parameters()], dy)

    def of_torch() -> object:
        y = stock(x)
        return torch.autograd.grad(y if activation is None else F.relu(y), [x, *stock.parameters()], dy)

    return {"ours": of_ours, "torch": of_torch}


def measure() -> list[dict[str, Any]]:
    """Return one record per shape and activation."""
    records = []
    for shape in SHAPES:
        for activation in (None, "relu"):
            steps = _steps(shape, activation)
            times = interleaved({name: sampler(step) for name, step in steps.items()}, SECONDS)
            records.append(
                {
                    "shape": list(shape),
                    "bytes": 4 * torch.Size(shape).numel(),
                    "positions": torch.Size(shape[2:]).numel(),
                    "activation": activation or "none",
                    "microseconds": {
                        name: asdict(quartiles([1e6 * value for value in seconds])) for name, seconds in times.items()
                    },
                    "times_faster": asdict(quartiles(ratios(times["torch"], times["ours"]))),
                }
            )
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Return the ratios as a Markdown table, one row per shape."""
    ratios = {(tuple(record["shape"]), record["activation"]): record["times_faster"]["median"] for record in records}
    rows = []
    for shape in SHAPES:
        none, relu = (f"{ratios[shape, activation]:.2f}" for activation in ("none", "relu"))
        rows.append(f"| {'x'.join(map(str, shape))} | {none} | {relu} |")
    return "\n".join(["| shape | no activation | ReLU |", "| --- | ---: | ---: |", *rows, ""])


def main() -> None:
    """Measure, write the file and fill the table of the page."""
    bn.tune_allocator()
    content = {"command": "python benchmarks/small_batches.py", "machine": asdict(describe(allocator="tuned"))}
    records = measure()
    RESULTS.write_text(json.dumps(content | {"results": records}, indent=1) + "\n")
    PAGE.write_text(replace_table(PAGE.read_text(), "small batches", table(records)))
    print(table(records))  # noqa: T201


if __name__ == "__main__":
    main()
