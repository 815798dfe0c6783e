"""Time whole training steps on the CPU, accelerated against stock: python benchmarks/accelerated_models.py --write.

Both networks have the same weights and take the same batches in one process, with the same settings of the allocator,
one step of each in turn. A step is forward, loss, backward and gradient descent. The ratio is that of the medians. The
inference of `bn.fold` is timed against stock likewise, for a third of the seconds. With --write the results go to
benchmarks/results/accelerated_models.json; the table is printed in Markdown.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import batchnorm as bn

RESULTS = Path(__file__).parent / "results/accelerated_models.json"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
CASES = [  # model, batch, image, layout
    ("torchvision/resnet50", 8, 224, "contiguous"),
    ("torchvision/resnet50", 8, 224, "channels-last"),
    ("torchvision/mobilenet_v2", 16, 224, "contiguous"),
    ("torchvision/mobilenet_v2", 16, 224, "channels-last"),
    ("torchvision/resnet18", 16, 128, "contiguous"),
    ("torchvision/mobilenet_v3_small", 16, 128, "contiguous"),
    ("torchvision/regnet_y_400mf", 16, 128, "contiguous"),
    ("torchvision/densenet121", 8, 128, "contiguous"),
    ("torchvision/shufflenet_v2_x1_0", 16, 128, "contiguous"),
    ("torchvision/googlenet", 16, 128, "contiguous"),
    ("timm/efficientnet_b0", 16, 128, "contiguous"),
    ("timm/dla34", 8, 128, "contiguous"),
    ("timm/repvgg_a0", 16, 128, "contiguous"),
]


def built(name: str) -> nn.Module:
    """Return a network with random weights."""
    library, _, name = name.partition("/")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "+cpu" in torch.__version__ and "torchvision" not in sys.modules:  # its kernels may be those of a CUDA build
            torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import timm
        import torchvision

        if library == "timm":
            return timm.create_model(name)  # type: ignore[no-any-return]
        options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        return getattr(torchvision.models, name)(**options)  # type: ignore[no-any-return]


def step_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], object]:
    """Return a training step."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def medians(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Return the median milliseconds of calls that take turns."""
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls * 2:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[0]) < 5:
        for times, call in zip(taken, calls, strict=True):
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
    return [1e3 * statistics.median(times) for times in taken]


def measure(name: str, batch: int, image: int, layout: str, seconds: float) -> dict[str, Any]:
    """Return the row of a case."""
    memory = LAYOUTS[layout]
    stock = built(name).to(memory_format=memory)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, image, image).contiguous(memory_format=memory)
    labels = torch.randint(1000, (batch,))
    fast, report = bn.accelerate(stock)
    fused = sum("+" in row.after for row in report.layers)
    training = medians([step_of(copy.deepcopy(stock), images, labels), step_of(fast, images, labels)], seconds)
    stock.eval()
    folded, _ = bn.fold(stock)
    with torch.inference_mode():
        inference = medians([lambda: stock(images), lambda: folded(images)], seconds / 3)
    return {
        "model": name,
        "batch": batch,
        "image": image,
        "layout": layout,
        "layers": len(report.layers),
        "fused": fused,
        "training_ms": training,
        "training_ratio": training[0] / training[1],
        "inference_ms": inference,
        "inference_ratio": inference[0] / inference[1],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows in Markdown."""
    lines = ["| model | layout | batch norms, fused | training, times stock | folded inference, times stock |"]
    lines.append("|---|---|---|---|---|")
    lines += [
        f"| {row['model']}, {row['batch']} x {row['image']} px | {row['layout']} | {row['layers']}, {row['fused']} | "
        f"{row['training_ratio']:.2f} | {row['inference_ratio']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Time all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="per model, for its training steps")
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    bn.tune_allocator()
    rows = []
    for case in CASES:
        if options.only in case[0]:
            rows.append(measure(*case, options.seconds))
            print(table(rows[-1:]).splitlines()[-1], flush=True)  # noqa: T201
    if options.write:
        record = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))  # noqa: T201


if __name__ == "__main__":
    main()
