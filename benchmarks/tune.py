"""Measure fine-tuning with `batchnorm.tune`: python benchmarks/tune.py.

Writes benchmarks/results/tune.json, and its table into docs/surgery.md. Each network is trained with frozen statistics:
with torch's layers in eval mode, with batchnorm's layers frozen, and tuned. A step is a forward and a backward in
float32 on one thread; the three take turns in one process, and a ratio is the processor time of torch's step over
theirs, the median over the rounds. Saved bytes are those of the tensors that the forward keeps for the backward,
without parameters, buffers and the input.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.lab.bench.markdown import replace_table
from batchnorm.lab.bench.models import batch_of, network
from batchnorm.lab.bench.timing import interleaved, quartiles, ratios, sampler
from batchnorm.lab.machine import describe

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/tune.json"
PAGE = ROOT / "docs/surgery.md"
SECONDS = 5.0
NETWORKS = {"resnet50": "ResNet-50", "mobilenetv2": "MobileNetV2"}
BATCHES = ((8, 96), (4, 224))
SIDES = ("torch", "frozen", "tuned")


def saved_bytes(forward: Callable[[], Tensor], resident: list[Tensor]) -> int:
    """Return the bytes that a forward keeps for the backward, without those of tensors that are there anyway."""
    known = {each.untyped_storage().data_ptr() for each in resident}
    kept: dict[int, int] = {}

    def pack(values: Tensor) -> Tensor:
        storage = values.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return values

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
        loss = forward()  # which keeps the tensors, so that no two have the same address
    assert loss.requires_grad
    return sum(kept.values())


def sides(name: str, images: Tensor) -> dict[str, nn.Module]:
    """Return a network with each kind of layers, all with the same values."""
    stock = network(name)
    frozen = bn.freeze(bn.convert(stock)[0])
    tuned, report = bn.tune(stock, {"pixel_values": images})
    assert not report.left, report
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return {"torch": stock, "frozen": frozen, "tuned": tuned}


def _row(name: str, size: int, image: int) -> dict[str, Any]:
    images, labels = batch_of(size, "contiguous", image)
    steps, saved, losses = {}, {}, {}
    for side, model in sides(name, images).items():
        parameters = list(model.parameters())

        def forward(model: nn.Module = model) -> Tensor:
            loss: Tensor = model(pixel_values=images, labels=labels).loss
            return loss

        def step(forward: Callable[[], Tensor] = forward, parameters: list[nn.Parameter] = parameters) -> object:
            return torch.autograd.grad(forward(), parameters)

        losses[side] = forward().item()
        saved[side] = saved_bytes(forward, [*parameters, *model.buffers(), images, labels])
        steps[side] = sampler(step, time.process_time)
    torch.testing.assert_close(losses["tuned"], losses["torch"], rtol=1e-4, atol=0)
    times = interleaved(steps, SECONDS)
    return {
        "network": name,
        "batch": size,
        "image": image,
        "saved_bytes": saved,
        "weight_bytes": sum(4 * each.numel() for each in parameters if each.dim() > 1),
        "seconds": {side: asdict(quartiles(times[side])) for side in SIDES},
        "times_faster": {side: asdict(quartiles(ratios(times["torch"], times[side]))) for side in SIDES[1:]},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| network | batch | saved, torch | frozen | tuned | less | step, frozen | tuned |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results:
        saved, faster = row["saved_bytes"], row["times_faster"]
        lines.append(
            f"| {NETWORKS[row['network']]} | {row['batch']} x {row['image']}x{row['image']} | "
            f"{' | '.join(f'{saved[side] / 1e6:.0f} MB' for side in SIDES)} | "
            f"{1 - saved['tuned'] / saved['torch']:.0%} | "
            f"{' | '.join(format(faster[side]['median'], '.2f') + 'x' for side in SIDES[1:])} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write the file and fill the table of the page."""
    bn.tune_allocator()
    torch.set_num_threads(1)
    results = [_row(name, *batch) for name in NETWORKS for batch in BATCHES]
    machine = asdict(describe(allocator="tuned"))
    content = {"command": "python benchmarks/tune.py", "machine": machine, "seconds": SECONDS, "results": results}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    PAGE.write_text(replace_table(PAGE.read_text(), "tune", table(results)))
    print(table(results), end="")  # noqa: T201


if __name__ == "__main__":
    main()
