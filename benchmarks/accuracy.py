"""Measure the errors of float32 batch normalization against float64: python benchmarks/accuracy.py.

The script writes benchmarks/results/accuracy.json, prints its table as Markdown, and inserts it into docs/accuracy.md.
Each number is the largest error of y over 3 seeds, in units of 1 + |y|, for training batches without gamma and beta.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.kernels import library, reference
from batchnorm.kernels.records import Operands, Rule
from batchnorm.lab.bench.markdown import replace_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/accuracy.json"
PAGE = ROOT / "docs/accuracy.md"
SEEDS = range(3)
LAYOUTS = ("contiguous", "channels last")
SHAPE = (16, 8, 28, 28)

Sides = dict[str, Callable[[Tensor, float], Tensor]]


def _sides() -> Sides:
    return {
        "native": lambda x, eps: bn.batch_norm(x, None, None, training=True, eps=eps),
        "reference": lambda x, eps: reference.forward(
            Operands(x), reference.moments(x), Rule(eps, None, training=True)
        ),
        "torch": lambda x, eps: F.batch_norm(x, None, None, training=True, eps=eps),
    }


def _batches(seed: int) -> Iterator[tuple[str, float, Tensor]]:
    """Yield the name, eps and batch (float32, contiguous) of each case."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for ratio in ("0", "1", "1e2", "1e3", "1e5"):
        yield f"mean {ratio} standard deviations", 1e-5, (normal(*SHAPE) + float(ratio)).float()
    for constant in ("0.1", "100.1", "1e7"):
        for count in (37, 1000):
            yield f"constant {constant}, {count} values", 1e-5, torch.full((count, 8, 1, 1), float(constant))
    yield "values near 1e30", 1e-5, (normal(*SHAPE) * 1e30).float()
    yield "subnormal values, near 1e-40", 1e-80, (normal(*SHAPE) * 1e-40).float()
    outlier = normal(*SHAPE).float()
    outlier[0, :, 0, 0] = 1e4
    yield "first value 1e4", 1e-5, outlier


def _formula(x: Tensor, eps: float) -> Tensor:
    """Compute x_hat in float64, as the formula reads. The mean of a constant channel is exact."""
    x = x.double()
    dims = (0, 2, 3)
    first = x[:1, :, :1, :1]
    mean = first + (x - first).mean(dims, keepdim=True)
    var = ((x - mean) ** 2).mean(dims, keepdim=True)
    return (x - mean) / torch.sqrt(var + eps)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """Return the batch in a layout; (N, C, 1, 1), which is the same in both, becomes (1, C, N, 1) to be contiguous."""
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    return x if x.shape[2:].numel() > 1 else x.permute(2, 1, 0, 3).contiguous()


def measure() -> dict[str, Any]:
    """Measure the largest error of each side, case and layout."""
    sides = _sides()
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for seed in SEEDS:
        for name, eps, batch in _batches(seed):
            for layout in LAYOUTS:
                x = _laid_out(batch, layout)
                expected = _formula(x, eps)
                found = errors.setdefault(name, {}).setdefault(layout, {})
                for side, function in sides.items():
                    error = ((function(x, eps).double() - expected).abs() / (1 + expected.abs())).max().item()
                    # JSON has no NaN: count it as an infinite error
                    worst = error if error < float("inf") else 1e999
                    found[side] = max(found.get(side, 0.0), worst)
    return {
        "command": "python benchmarks/accuracy.py",
        "machine": {
            "kernels": f"native ({library.instructions()})",
            "torch": torch.__version__,
            "batchnorm": bn.__version__,
            "threads": torch.get_num_threads(),
        },
        "shape": list(SHAPE),
        "seeds": len(SEEDS),
        "errors": [
            {"case": name, "layout": layout, **{side: _number(value) for side, value in found.items()}}
            for name, layouts in errors.items()
            for layout, found in layouts.items()
        ],
    }


def _number(error: float) -> float | str:
    return "not finite" if error == float("inf") else float(f"{error:.3g}")


def _cell(error: float | str) -> str:
    return error if isinstance(error, str) else "0" if error == 0 else f"{error:.1e}"


def table(content: dict[str, Any]) -> str:
    """Return the errors as a Markdown table."""
    machine = content["machine"]
    lines = [
        f"`{content['command']}`: kernels {machine['kernels']}, torch {machine['torch']}, "
        f"{machine['threads']} threads.",
        "",
        "| batch | layout | native | reference | torch |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['case']} | {row['layout']} | "
        f"{' | '.join(_cell(row[side]) for side in ('native', 'reference', 'torch'))} |"
        for row in content["errors"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if library.reason() is not None or bn.kernels().cpu.name != "native":
        raise SystemExit(f"the native kernels must run; got {bn.kernels().cpu}")
    content = measure()
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    PAGE.write_text(replace_table(PAGE.read_text(), "table", table(content)))
    print(table(content), end="")  # noqa: T201
