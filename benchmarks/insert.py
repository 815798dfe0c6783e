"""Train deep networks without batch normalization, and with what `insert` makes of them: python benchmarks/insert.py.

Writes benchmarks/results/insert.json, and its table into docs/surgery.md. Two networks learn scikit-learn's digits,
8x8 images with values divided by 16: eight hidden layers of 64 ReLU, and a VGG-like network of seven convolutions and
one hidden linear layer. Their initial weights are torch's default, which let the activations shrink from layer to
layer. For each seed the same initial network is trained as it is, with ``batchnorm.insert(network, "before")`` and with
``batchnorm.insert(network, "after")``; and, for comparison, as it is with the initial weights of He et al. (2015),
which keep the size of the activations. Training is stochastic gradient descent, 10 epochs over 1,200 images in batches
of 60, at three learning rates. The accuracy is that on the other 597 images, in eval mode.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.lab.bench.markdown import replace_table
from batchnorm.lab.machine import describe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/insert.json"
PAGE = ROOT / "docs/surgery.md"

SEEDS = range(5)
LEARNING_RATES = (0.03, 0.1, 0.3)
EPOCHS, BATCH, TRAINED_ON = 10, 60, 1200
ARMS = {"none": "as it is", "He": "as it is, He's weights", "before": "before", "after": "after"}


def eight_layers() -> nn.Sequential:
    """Return a network of eight hidden layers."""
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def vgg_like() -> nn.Sequential:
    """Return a network of convolutions and max pooling, as those of Simonyan and Zisserman (2015)."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    channels = 1
    for width in (16, 16, 0, 32, 32, 0, 32, 32, 32):
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {"eight layers": eight_layers, "VGG-like": vgg_like}


def start(network: str, arm: str, seed: int) -> nn.Module:
    """Return a network of an arm with its initial weights."""
    torch.manual_seed(seed)
    model: nn.Module = NETWORKS[network]()
    if arm in ("before", "after"):
        model, _ = bn.insert(model, "before" if arm == "before" else "after")
    if arm == "He":
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def accuracy(model: nn.Module, learning_rate: float, seed: int, x: Tensor, y: Tensor) -> float:
    """Train the model, and return its accuracy on the images that it was not trained on."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    training, test = order[:TRAINED_ON], order[TRAINED_ON:]
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    model.train()
    for _ in range(EPOCHS):
        for batch in training[torch.randperm(TRAINED_ON, generator=generator)].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return float((model(x[test]).argmax(1) == y[test]).double().mean())


def measure() -> list[dict[str, Any]]:
    """Return one record per network, learning rate and arm."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    return [
        {
            "network": network,
            "learning_rate": rate,
            "arm": arm,
            "accuracies": [accuracy(start(network, arm, seed), rate, seed, x, y) for seed in SEEDS],
        }
        for network in NETWORKS
        for rate in LEARNING_RATES
        for arm in ARMS
    ]


def table(records: list[dict[str, Any]]) -> str:
    """Return the median accuracies as a Markdown table, with the lowest and the highest over the seeds."""
    found = {(record["network"], record["learning_rate"], record["arm"]): record["accuracies"] for record in records}

    def cell(accuracies: list[float]) -> str:
        return f"{statistics.median(accuracies):.1%} ({min(accuracies):.1%} to {max(accuracies):.1%})"

    rows = [
        f"| {network} | {rate:g} | {' | '.join(cell(found[network, rate, arm]) for arm in ARMS)} |"
        for network in NETWORKS
        for rate in LEARNING_RATES
    ]
    header = f"| network | learning rate | {' | '.join(ARMS.values())} |"
    return "\n".join([header, "| --- | ---: | ---: | ---: | ---: | ---: |", *rows, ""])


def main() -> None:
    """Measure, write the file and fill the table of the page."""
    torch.set_num_threads(1)
    content = {"command": "python benchmarks/insert.py", "machine": asdict(describe(allocator="stock"))}
    records = measure()
    RESULTS.write_text(json.dumps(content | {"results": records}, indent=1) + "\n")
    PAGE.write_text(replace_table(PAGE.read_text(), "insert", table(records)))


if __name__ == "__main__":
    main()
