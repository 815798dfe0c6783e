"""Disagreement of training and eval at batch size 4, with and without batch renormalization, on the digits.

    python benchmarks/renorm_agreement.py --seeds 10 --steps 3000 --out benchmarks/results/renorm_agreement.json

Both arms see the same rows in the same order and start from the same weights. The disagreement is the mean absolute
difference between the logits of validation rows in training mode, in batches of 4, and in eval, divided by the standard
deviation of the latter. The accuracy is that of eval.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm as bn

BATCH, HIDDEN, LEARNING_RATE, MOMENTUM = 4, 100, 0.03, 0.01
R_MAX, D_MAX = 3.0, 5.0

Rows = tuple[Tensor, Tensor]


def arms(steps: int) -> dict[str, bn.RenormSchedule | None]:
    """Return the renormalization of each arm; the ramps of Ioffe (2017), scaled to end at half of the steps."""
    schedule = bn.RenormSchedule(R_MAX, D_MAX, start=steps // 16, r_end=steps // 2, d_end=steps * 5 // 16)
    return {"plain": None, "renorm": schedule}


def digits(seed: int) -> tuple[Rows, Rows]:
    """Return training and validation rows, each pixel standardized by the training rows; a constant pixel stays 0."""
    X, y = load_digits(return_X_y=True)
    parts = train_test_split(X, y, test_size=0.25, random_state=seed, stratify=y)
    x, x_validation = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    mean, deviation = x.mean(0), x.std(0)
    deviation[deviation == 0] = 1.0
    labels, labels_validation = (torch.tensor(part) for part in parts[2:])
    return ((x - mean) / deviation, labels), ((x_validation - mean) / deviation, labels_validation)


def trained(renorm: bn.RenormSchedule | None, rows: Rows, seed: int, steps: int) -> nn.Module:
    """Return the network after a number of steps of gradient descent on batches of 4."""
    torch.manual_seed(seed)
    norm = bn.BatchNorm1d(HIDDEN, momentum=MOMENTUM, renorm=renorm, activation="relu")
    model = nn.Sequential(nn.Linear(64, HIDDEN, bias=False), norm, nn.Linear(HIDDEN, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    x, labels = rows
    for _ in range(steps):
        chosen = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model


@torch.no_grad()
def measure(model: nn.Module, rows: Rows) -> dict[str, float]:
    """Return the disagreement of training and eval, and the accuracy of eval."""
    x, labels = rows
    x, labels = x[: len(x) // BATCH * BATCH], labels[: len(x) // BATCH * BATCH]
    model.train()
    with bn.no_stat_updates(model):
        in_training = torch.cat([model(part) for part in x.split(BATCH)])
    model.eval()
    in_eval = model(x)
    return {
        "disagreement": ((in_training - in_eval).abs().mean() / in_eval.std()).item(),
        "accuracy": (in_eval.argmax(1) == labels).float().mean().item(),
    }


def study(seeds: int, steps: int) -> dict[str, Any]:
    """Return the measurements of both arms for every seed, and their medians."""
    found: list[dict[str, Any]] = []
    for seed in range(seeds):
        training, validation = digits(seed)
        found.append(
            {"seed": seed}
            | {name: measure(trained(arm, training, seed, steps), validation) for name, arm in arms(steps).items()}
        )
    medians = {
        name: {number: statistics.median(row[name][number] for row in found) for number in ("disagreement", "accuracy")}
        for name in arms(steps)
    }
    return {"seeds": found, "medians": medians}


def main() -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    found = study(arguments.seeds, arguments.steps)
    report = {
        "command": f"python benchmarks/renorm_agreement.py --seeds {arguments.seeds} --steps {arguments.steps} "
        f"--out {arguments.out}",
        "machine": {
            "system": platform.system(),
            "cores": os.cpu_count(),
            "kernels": str(bn.kernels().cpu),
            "torch": str(torch.__version__),
            "batchnorm": bn.__version__,
        },
        "settings": {
            "data": "digits",
            "layers": [64, HIDDEN, 10],
            "batch": BATCH,
            "steps": arguments.steps,
            "learning_rate": LEARNING_RATE,
            "momentum": MOMENTUM,
            "renorm": str(arms(arguments.steps)["renorm"]),
        },
        **found,
        "seconds": round(time.perf_counter() - started, 1),
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, medians in found["medians"].items():
        print(f"{name}: disagreement {medians['disagreement']:.3f}, accuracy {medians['accuracy']:.3f}")  # noqa: T201


if __name__ == "__main__":
    main()
