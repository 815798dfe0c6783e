"""Measure on shifted digits how much adapting a network's statistics helps, and whether the shift is detected.

    python benchmarks/shift.py --out benchmarks/results/shift.json

For each seed, a small convolutional network is trained on half of scikit-learn's digits; its statistics are those that
training leaves. The other half is never trained on, and is shifted in one of four ways at one of five severities, or
not at all:

- brightness: a fraction of the full range is added, and values are clipped to the range;
- contrast: deviations from the image's mean are multiplied;
- blur: a Gaussian filter, whose width is in pixels;
- noise: normal noise is added, and values are clipped to the range.

**Adaptation.** `batchnorm.adapt` is given a number of unlabelled images, drawn at random; the accuracy is measured on
the images not drawn. "Retrained" is a network trained from the start on half of the shifted images with their labels;
its accuracy is measured on the other half. **Detection.** `batchnorm.detect_shift` is given a number of images, drawn
at random, with its default options (alpha = 0.05). It compares them with the stored statistics alone, and with the
original versions of the images not drawn. A draw of images without a shift that is reported is a false alarm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.lab.bench.markdown import replace_table
from batchnorm.lab.machine import describe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/shift.json"
PAGE = ROOT / "docs/statistics.md"

STEPS, BATCH, LEARNING_RATE = 400, 60, 0.1
PRIOR, ALPHA = 16, 0.05
ADAPTED_TO = (16, 32, 128)
TESTED_ON = (16, 32, 64, 128)
SEVERITIES: dict[str, tuple[float, ...]] = {
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.8, 0.6, 0.4, 0.3, 0.2),
    "blur": (0.4, 0.6, 0.8, 1.0, 1.2),
    "noise": (0.1, 0.2, 0.3, 0.4, 0.5),
}

CASES = [("none", 0.0), *((kind, amount) for kind, amounts in SEVERITIES.items() for amount in amounts)]
HOW = ("stored statistics", "clean images")

Images = tuple[Tensor, Tensor]


def shifted(images: Tensor, kind: str, amount: float, generator: np.random.Generator) -> Tensor:
    """Shift images (N, 1, 8, 8), whose values are from 0 to 1."""
    values = images.numpy()
    if kind == "brightness":
        values = values + amount
    elif kind == "contrast":
        level = values.mean((1, 2, 3), keepdims=True)
        values = level + amount * (values - level)
    elif kind == "blur":
        values = gaussian_filter(values, (0, 0, amount, amount), mode="nearest")
    else:
        values = values + amount * generator.normal(size=values.shape)
    return torch.tensor(np.clip(values, 0, 1), dtype=torch.float32)


def digits(seed: int) -> tuple[Images, Images]:
    """Return the images and labels to train on, and the other half."""
    X, y = load_digits(return_X_y=True)
    parts = train_test_split(X / 16, y, test_size=0.5, random_state=seed, stratify=y)
    x, x_test = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in parts[:2])
    return (x, torch.tensor(parts[2])), (x_test, torch.tensor(parts[3]))


def network() -> nn.Sequential:
    """Return three convolutions (16, 32 and 32 channels) with batch normalization and ReLU, and a linear map."""
    blocks: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        blocks += [convolution, bn.BatchNorm2d(outputs, activation="relu")]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32 * 4 * 4, 10))


def trained(images: Images, seed: int) -> nn.Module:
    """Train a network by gradient descent on random batches, and return it in eval mode."""
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    x, labels = images
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that are classified correctly."""
    return (model(images).argmax(1) == labels).float().mean().item()


def _order(count: int, generator: np.random.Generator) -> Tensor:
    return torch.from_numpy(generator.permutation(count))


def adaptation(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    """Return the accuracy as is, and those after adapting to some of the images, measured on the others."""
    order = _order(len(images), np.random.default_rng(seed))
    found = {"as is": accuracy(model, images, labels)}
    for count in ADAPTED_TO:
        given, kept = order[:count], order[count:]
        with bn.adapt(model, [images[given]], prior=PRIOR):
            found[str(count)] = accuracy(model, images[kept], labels[kept])
    return found


def retraining(images: Tensor, labels: Tensor, seed: int) -> float:
    """Return the accuracy of a network trained on half of the shifted images, on the other half."""
    order = _order(len(images), np.random.default_rng(seed))
    given, kept = order.tensor_split(2)
    return accuracy(trained((images[given], labels[given]), seed), images[kept], labels[kept])


def detection(model: nn.Module, clean: Tensor, images: Tensor, repeats: int, seed: int) -> dict[str, dict[str, int]]:
    """Count the draws that are reported, against the stored statistics and against clean images."""
    generator = np.random.default_rng(seed)
    reported: dict[str, dict[str, int]] = {how: {str(count): 0 for count in TESTED_ON} for how in HOW}
    for count in TESTED_ON:
        for _ in range(repeats):
            order = _order(len(images), generator)
            drawn, others = [images[order[:count]]], clean[order[count:]].split(256)
            for how, kept in zip(HOW, (None, others), strict=True):
                reported[how][str(count)] += bn.detect_shift(model, drawn, reference=kept, alpha=ALPHA).shifted
    return reported


def of_seed(seed: int, repeats: int) -> list[dict[str, Any]]:
    """Return the measurements of one network, case by case."""
    torch.set_num_threads(1)
    known, (clean, labels) = digits(seed)
    model = trained(known, seed)
    found = []
    for kind, amount in CASES:
        images = clean if kind == "none" else shifted(clean, kind, amount, np.random.default_rng(seed))
        accuracies = adaptation(model, images, labels, seed) | {"retrained": retraining(images, labels, seed)}
        found.append({"accuracy": accuracies, "reported": detection(model, clean, images, repeats, seed)})
    return found


def study(seeds: int, repeats: int, jobs: int) -> list[dict[str, Any]]:
    """Return for each case the median accuracies over seeds, the shares of draws reported, and all accuracies."""
    found = joblib.Parallel(n_jobs=jobs)(joblib.delayed(of_seed)(seed, repeats) for seed in range(seeds))
    cases = []
    for (kind, amount), of_seeds in zip(CASES, zip(*found, strict=True), strict=True):
        accuracies, reports = [each["accuracy"] for each in of_seeds], [each["reported"] for each in of_seeds]
        cases.append(
            {
                "shift": kind,
                "severity": 0 if kind == "none" else SEVERITIES[kind].index(amount) + 1,
                "amount": amount,
                "accuracy": {name: statistics.median(each[name] for each in accuracies) for name in accuracies[0]},
                "reported": {
                    how: {
                        count: sum(each[how][count] for each in reports) / (seeds * repeats)
                        for count in reports[0][how]
                    }
                    for how in HOW
                },
                "accuracy_by_seed": accuracies,
            }
        )
    return cases


def table(content: dict[str, Any]) -> str:
    """Return the accuracies and the shares of draws reported, as Markdown."""
    heads = ["shift", "severity", "as is", *(f"adapted, {count}" for count in ADAPTED_TO), "retrained"]
    heads += [f"noticed, {count}" for count in TESTED_ON]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for case in content["cases"]:
        cells = [case["shift"], str(case["severity"] or "")]
        cells += [f"{100 * value:.1f}" for value in case["accuracy"].values()]
        cells += [f"{100 * case['reported'][HOW[0]][str(count)]:.1f}" for count in TESTED_ON]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=20, help="draws per seed, count and shift")
    parser.add_argument("--jobs", type=int, default=1, help="processes, with one thread each")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    started = time.perf_counter()
    cases = study(arguments.seeds, arguments.repeats, arguments.jobs)
    content = {
        "command": f"python benchmarks/shift.py --seeds {arguments.seeds} --repeats {arguments.repeats} "
        f"--out {arguments.out}",
        "machine": asdict(describe(allocator="stock")),
        "settings": {
            "steps": STEPS,
            "batch": BATCH,
            "learning_rate": LEARNING_RATE,
            "prior": PRIOR,
            "alpha": ALPHA,
            "severities": SEVERITIES,
            "draws": arguments.seeds * arguments.repeats,
        },
        "cases": cases,
        "seconds": round(time.perf_counter() - started, 1),
    }
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.out.resolve() == RESULTS:
        PAGE.write_text(replace_table(PAGE.read_text(), RESULTS.name, table(content)))
    print(table(content), end="")  # noqa: T201


if __name__ == "__main__":
    main()
