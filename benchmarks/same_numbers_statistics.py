"""Cases of same_numbers.py: running statistics over loaders and over processes."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from same_numbers_layers import BIASED, DTYPES, LAYOUTS, OPTIONS, Batch, batches, layer_for, step, training
from same_numbers_values import Values, normal, prefixed, sorted_numbers
from torch import Tensor, nn

import batchnorm as bn

__all__ = ["STATISTICS_GROUPS"]

RANKS = 2


def moments() -> Values:
    """Yield `Moments` of batches of all dtypes and layouts, merged one after the other."""
    for dtype, layout, channel_dim in itertools.product(DTYPES, LAYOUTS, (1, -1)):
        whole = bn.Moments.empty(5 if channel_dim == 1 else 7)
        for seed, (x, _, mask) in enumerate(batches((6, 5, 7), dtype, layout, "mask", 4, channel_dim)):
            whole = whole.merge(bn.Moments.of(x, channel_dim, mask if seed % 2 else None))
        label = f"{dtype}, {layout}, {channel_dim}"
        yield from prefixed(label, [("count", whole.count), ("mean", whole.mean), ("m2", whole.m2)])
        yield from prefixed(label, [("var", whole.var()), ("unbiased", whole.var(unbiased=True))])


def network(*, ours: bool = True, **options: Any) -> nn.Module:
    """Return a small convolutional network with our layers or torch's, trained for a few steps."""
    torch.manual_seed(0)
    norms = [bn.BatchNorm2d(6, **options), bn.BatchNorm2d(8, activation="relu"), bn.BatchNorm1d(7, **options)]
    if not ours:
        norms = [nn.BatchNorm2d(6), nn.BatchNorm2d(8), nn.BatchNorm1d(7)]
    convolutions = [nn.Conv2d(3, 6, 3), norms[0], nn.ReLU(), nn.Conv2d(6, 8, 3), norms[1], nn.Flatten()]
    model = nn.Sequential(*convolutions, nn.Linear(8 * 16, 7), norms[2], nn.ReLU(), nn.Linear(7, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x in images(steps=5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


def images(steps: int, shift: float = 0.0, seed: int = 0) -> list[Tensor]:
    """Return batches of small images, the last one smaller."""
    sizes = [*(steps - 1) * [16], 5]
    return [normal(size, 3, 8, 8, seed=seed + number) * (1 + shift) + shift for number, size in enumerate(sizes)]


def models() -> dict[str, nn.Module]:
    """Return trained networks: of our layers with several options, and of torch's."""
    found = {"ours": network(), "biased": network(**BIASED), "torch": network(ours=False), "frozen": network()}
    bn.freeze(found["frozen"][1])
    found["domains"] = bn.add_domains(network(), ["day", "night"])
    return found


def report_values(report: Any, model: nn.Module) -> Values:
    """Yield the numbers of a report and of the running statistics after it."""
    yield "report", sorted_numbers(report)
    yield from model.state_dict().items()
    yield "output", model(images(1, 0.5, seed=50)[0])


def recalibrations() -> Values:
    """Yield recalibrated models, in both modes, over all samples and some."""
    settings: tuple[dict[str, Any], ...] = (
        {},
        {"mode": "at_once"},
        {"max_samples": 40},
        {"mode": "at_once", "tolerance": 0.3},
        {"tolerance": 0.2},
        {"forward": lambda model, batch: model(batch * 2)},
    )
    for number, given in enumerate(settings):
        for name, model in models().items():
            report = bn.recalibrate(model, images(6, 0.3, seed=10), **given)
            yield from prefixed(f"{name}, settings {number}", report_values(report, model))


def adaptations() -> Values:
    """Yield models that are adapted to a loader and to each batch, and undone."""
    for (name, model), prior in itertools.product(models().items(), (0, 16, 100.5)):
        label = f"{name}, prior {prior}"
        with bn.adapt(model, images(4, 0.5, seed=20), prior=prior) as report:
            yield from prefixed(f"{label}, loader", report_values(report, model))
        with bn.adapt(model, prior=prior) as report:
            for number, x in enumerate([*images(3, 0.5, seed=30), images(1)[0] * torch.nan]):
                yield f"{label}, batch {number}", model(x)
        yield from prefixed(f"{label}, undone", report_values(report, model))


def shifts() -> Values:
    """Yield tests for a shift against the stored statistics and against other data."""
    for (name, model), shift in itertools.product(models().items(), (0.0, 0.2, 2.0)):
        data = images(5, shift, seed=40)
        settings: tuple[dict[str, Any], ...] = (
            {},
            {"reference": images(8, seed=60)},
            {"reference_samples": 50, "seed": 3, "max_samples": 40, "alpha": 0.2},
        )
        for number, given in enumerate(settings):
            found = bn.detect_shift(model, data, **given)
            label = f"{name}, shift {shift}, settings {number}"
            yield f"{label}, report", sorted_numbers(found)
            for position, layer in enumerate(found.layers):
                yield f"{label}, layer {position}", sorted_numbers(layer)
            yield from prefixed(label, [("p", found.p_value), ("shifted", found.shifted)])


def snapshots() -> Values:
    """Yield snapshots in memory and in files, and models they are restored to."""
    for name, model in models().items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "statistics.safetensors"
            taken = bn.snapshot(model, path)
            yield from prefixed(f"{name}, taken", sorted(taken.tensors.items()))
            for kind, source in (("memory", taken), ("file", path)):
                model.train()(images(1, 1.0)[0])
                yield from prefixed(f"{name}, {kind}, moved", model.state_dict().items())
                yield from prefixed(f"{name}, {kind}", bn.restore(model, source).state_dict().items())


def on_rank(rank: int) -> Values:
    """Yield synchronized layers and pooled statistics on one of two processes, whose batches differ in size."""
    names = ("activation=relu", "activation=gelu", "affine=False", "biased", "momentum=None", "renorm schedule")
    for name, dtype, extras in itertools.product(names, (torch.float32, torch.bfloat16), ("", "residual and mask")):
        sizes = ((6, 4, 1, 0), (3, 4, 2, 5))[rank]
        data = [batches((size, 5, 4), dtype, "contiguous", extras, 1)[0] for size in sizes]
        shifted = [Batch(x + rank, residual, mask) for x, residual, mask in data]
        layer = layer_for(data[0].x, sync=True, **OPTIONS[name])
        yield from prefixed(f"{name}, {dtype}, {extras}", training(layer, shifted))
    merged = bn.Moments.of(normal(4 + rank, 5) + rank).all_reduce()
    yield from prefixed("moments", [("count", merged.count), ("mean", merged.mean), ("m2", merged.m2)])
    for name, model in models().items():
        for x in images(3 + rank, rank / 2, seed=70):
            model.train()(x)
        bn.pool_running_stats(model)
        yield from prefixed(f"{name}, pooled", model.state_dict().items())
        for mode in ("layerwise", "at_once"):
            report = bn.recalibrate(model.eval(), images(2 + rank, rank / 2, seed=80), mode=mode)
            yield from prefixed(f"{name}, {mode}", report_values(report, model))
        with bn.adapt(model, images(2 + rank, rank, seed=90)) as report:
            yield from prefixed(f"{name}, adapted", report_values(report, model))


def run_rank(rank: int, folder: str) -> None:
    """Write the values of one of the two processes to a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(minutes=1))
    values = {name: None if value is None else torch.as_tensor(value).clone() for name, value in on_rank(rank)}
    torch.save(values, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def processes() -> Values:
    """Yield the values of two processes that share their statistics."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [subprocess.Popen([sys.executable, __file__, str(rank), folder]) for rank in range(RANKS)]
        if [process.wait() for process in ranks] != [0] * RANKS:
            raise RuntimeError("every process must end without an error; see the one above")
        for rank in range(RANKS):
            yield from prefixed(f"rank {rank}", torch.load(f"{folder}/{rank}.pt").items())


def single_process() -> Values:
    """Yield a synchronized layer in a process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for dtype in DTYPES:
            data = batches((6, 5, 4), dtype, "contiguous", "residual")
            layer = layer_for(data[0].x, sync=True, activation="relu")
            yield from prefixed(f"{dtype}", training(layer, data))
            bn.pool_running_stats(layer)
            yield from prefixed(f"{dtype}, pooled", step(layer, data[0]))
    finally:
        dist.destroy_process_group()


STATISTICS_GROUPS: dict[str, Callable[[], Values]] = {
    each.__name__: each for each in (moments, recalibrations, adaptations, shifts, snapshots, processes, single_process)
}

if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
