"""Time fits of the estimators and of scikit-learn's on 1 and 2 threads: python benchmarks/estimators.py.

Writes benchmarks/results/estimators.json, and its sentences and tables into docs/estimators.md. The first table is
processor time per epoch, over all threads of the process, of fits with scikit-learn's default settings, idle and beside
one busy loop per core; the designs take turns, and a number is the median over the rounds. The second table times
training steps of networks of growing size, each on 1 and on 2 threads. Processor time suffers less from other work than
wall time, but the machine should be idle.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler, scale
from threadpoolctl import threadpool_limits
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.lab.bench.markdown import replace_table
from batchnorm.lab.machine import describe
from batchnorm.lab.training import threads
from batchnorm.lab.training.network import MLP

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/estimators.json"
PAGE = ROOT / "docs/estimators.md"
CLASSIFICATION = {"digits": load_digits, "wine": load_wine, "breast_cancer": load_breast_cancer}
REGRESSION = {"diabetes": load_diabetes}
ROUNDS, EPOCHS = 3, 10
SETTINGS = {"learning_rate_init": 0.001, "random_state": 0, "tol": 0.0, "n_iter_no_change": 10**6, "max_iter": EPOCHS}
DESIGNS = (
    ("ours", "before", "1"),
    ("ours", "before", "2"),
    ("ours", "before", "chosen"),
    ("ours", None, "chosen"),
    ("scikit-learn", None, "1"),
    ("scikit-learn", None, "2"),
)
BATCH = 200
NETWORKS = (  # inputs, hidden, outputs
    (13, (100,), 3),
    (64, (100,), 10),
    (64, (256,), 10),
    (100, (512,), 10),
    (64, (256, 256), 10),
    (784, (256,), 10),
    (128, (512, 512), 10),
    (784, (512, 512), 10),
    (784, (1024, 1024), 10),
)
STEPS, WARM_UP = 10, 2


@contextmanager
def busy_loops() -> Iterator[None]:
    """Keep every core busy with a process that only counts."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@contextmanager
def on_threads(library: str, number: str) -> Iterator[None]:
    """Run ours or scikit-learn's fits on so many threads; "chosen" lets ours choose between 1 and 2."""
    if library == "scikit-learn":
        with threadpool_limits(int(number)):
            yield
        return
    torch.set_num_threads(1 if number == "1" else 2)
    work = threads.WORK_PER_THREAD
    threads.WORK_PER_THREAD = work if number == "chosen" else 1.0
    try:
        yield
    finally:
        threads.WORK_PER_THREAD = work


def fit_of(data: str, library: str, batch_norm: str | None, **settings: Any) -> Callable[[], Any]:
    """Return a call that fits an estimator and returns it."""
    X, y = (CLASSIFICATION | REGRESSION)[data](return_X_y=True)
    X = StandardScaler().fit_transform(X)
    classes = data in CLASSIFICATION
    y = y if classes else scale(y)
    if library == "ours":
        ours = bn.BatchNormMLPClassifier if classes else bn.BatchNormMLPRegressor
        return lambda: ours(batch_norm=batch_norm, **settings).fit(X, y)
    theirs = MLPClassifier if classes else MLPRegressor
    return lambda: theirs(**settings).fit(X, y)


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return processor time and wall time in milliseconds, and the result."""
    time.sleep(0.2)  # threads of the call before spin for a while
    wall, processor = time.perf_counter(), time.process_time()
    result = call()
    return 1e3 * (time.process_time() - processor), 1e3 * (time.perf_counter() - wall), result


def epochs() -> list[dict[str, Any]]:
    """Return times per epoch, one record per data set, condition and design."""
    records = []
    for data in (*CLASSIFICATION, *REGRESSION):
        for condition, surroundings in (("idle", nullcontext), ("busy", busy_loops)):
            fits = {design: fit_of(data, *design[:2], **SETTINGS) for design in DESIGNS}
            times: dict[tuple[str, str | None, str], list[tuple[float, float]]] = {design: [] for design in DESIGNS}
            with surroundings():
                for turn in range(ROUNDS + 1):
                    for design, fit in fits.items():
                        with on_threads(design[0], design[2]):
                            processor, wall, _ = timed(fit)
                        if turn:  # the first one warms up
                            times[design].append((processor / EPOCHS, wall / EPOCHS))
            for (library, batch_norm, number), each in times.items():
                processor, wall = (round(statistics.median(values), 3) for values in zip(*each, strict=True))
                record = {"data": data, "condition": condition, "library": library, "batch_norm": batch_norm}
                records.append({**record, "threads": number, "processor_ms": processor, "wall_ms": wall})
                print(records[-1], flush=True)  # noqa: T201
    return records


def whole_fits() -> list[dict[str, Any]]:
    """Return the time of a fit at each library's defaults, idle, as it is without any setting of threads."""
    records = []
    for data in (*CLASSIFICATION, *REGRESSION):
        for library in ("ours", "scikit-learn"):
            fit = fit_of(data, library, "before", random_state=0)
            torch.set_num_threads(2)
            found = [timed(fit) for _ in range(ROUNDS)]
            processor, wall = (round(statistics.median(each[i] for each in found)) for i in (0, 1))
            record = {"data": data, "library": library, "processor_ms": processor, "wall_ms": wall}
            records.append(record | {"epochs": found[0][2].n_iter_})
    return records


def step_of(inputs: int, hidden: tuple[int, ...], outputs: int, dtype: torch.dtype) -> tuple[MLP, Callable[[], None]]:
    """Return a network, and a step that trains it on a mini-batch."""
    network = MLP(inputs, hidden, outputs).to(dtype)
    network.initialize([torch.Generator().manual_seed(0)])
    optimizer = torch.optim.Adam(network.parameters())
    x, y = torch.randn(BATCH, inputs, dtype=dtype), torch.randint(0, outputs, (BATCH,))

    def step() -> None:
        loss = F.cross_entropy(network(x)[0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return network, step


def sizes() -> list[dict[str, Any]]:
    """Return times per step on 1 and on 2 threads, one record per network and dtype."""
    records = []
    for dtype in (torch.float32, torch.float64):
        for inputs, hidden, outputs in NETWORKS:
            network, step = step_of(inputs, hidden, outputs, dtype)
            times: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
            for _ in range(ROUNDS):
                for number in times:
                    torch.set_num_threads(number)
                    for _ in range(WARM_UP):
                        step()
                    processor, wall, _ = timed(lambda step=step: [step() for _ in range(STEPS)])
                    times[number].append((processor / STEPS, wall / STEPS))
            medians = {
                number: [round(statistics.median(values), 3) for values in zip(*each, strict=True)]
                for number, each in times.items()
            }
            records.append(
                {
                    "network": [inputs, *hidden, outputs],
                    "dtype": str(dtype).removeprefix("torch."),
                    "chosen": min(2, threads.threads_for(network, BATCH, 3)),
                    "processor_ms": {str(number): median[0] for number, median in medians.items()},
                    "wall_ms": {str(number): median[1] for number, median in medians.items()},
                }
            )
    return records


def epochs_table(content: dict[str, Any]) -> str:
    """Return processor time per epoch as Markdown, one row per data set and condition."""
    names = ["ours, 1 thread", "ours, 2", "ours, as it is", "without batch norm", "scikit-learn, 1 thread", "2"]
    lines = [f"| data | machine | {' | '.join(names)} |", f"| --- | --- |{' ---: |' * len(names)}"]
    cells: dict[tuple[str, str], list[str]] = {}
    for record in content["epochs"]:
        cells.setdefault((record["data"], record["condition"]), []).append(f"{record['processor_ms']:.1f}")
    lines += [f"| {data} | {condition} | {' | '.join(row)} |" for (data, condition), row in cells.items()]
    return "\n".join(lines) + "\n"


def sizes_table(content: dict[str, Any]) -> str:
    """Return the gain and the cost of a second thread as Markdown, one row per network and dtype."""
    lines = [
        "| network | dtype | wall, 1 / 2 threads | processor, 2 / 1 | chosen |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for record in content["sizes"]:
        wall, processor = record["wall_ms"], record["processor_ms"]
        ratios = f"{wall['1'] / wall['2']:.2f} | {processor['2'] / processor['1']:.2f}"
        lines.append(f"| {'-'.join(map(str, record['network']))} | {record['dtype']} | {ratios} | {record['chosen']} |")
    return "\n".join(lines) + "\n"


def summary(content: dict[str, Any]) -> str:
    """Return the sentences that the page quotes."""

    def milliseconds(library: str, number: str, condition: str) -> str:
        wanted = {"data": "digits", "library": library, "threads": number, "condition": condition}
        wanted["batch_norm"] = "before" if library == "ours" else None
        (found,) = (record["processor_ms"] for record in content["epochs"] if wanted.items() <= record.items())
        return f"{found:.0f} ms"

    def fit(library: str) -> str:
        (found,) = (each for each in content["fits"] if (each["data"], each["library"]) == ("wine", library))
        return f"{found['processor_ms'] / 1000:.1f} s and {found['epochs']} epochs"

    load = content["machine"]["load"] or 0.0
    disturbed = f"Other work kept the machine busy all the time, at a load of {load:.1f}." if load > 1 else ""
    text = (
        f"An epoch of digits takes {milliseconds('ours', '1', 'idle')} of processor time on one thread and "
        f"{milliseconds('ours', '2', 'idle')} on two, and beside busy loops {milliseconds('ours', '1', 'busy')} and "
        f"{milliseconds('ours', '2', 'busy')}; as it is, {milliseconds('ours', 'chosen', 'idle')} and "
        f"{milliseconds('ours', 'chosen', 'busy')}. (scikit-learn's takes "
        f"{milliseconds('scikit-learn', '1', 'idle')} on one thread, without batch normalization; on two, "
        f"{milliseconds('scikit-learn', '2', 'idle')} and {milliseconds('scikit-learn', '2', 'busy')}.) A whole fit of "
        f"wine at the defaults takes {fit('ours')}, scikit-learn's {fit('scikit-learn')}. {disturbed}"
    )
    return textwrap.fill(text, 120) + "\n"


def filled(page: str, content: dict[str, Any]) -> str:
    """Return the page with the sentences and tables of the results."""
    page = replace_table(page, "estimators.json, summary", summary(content))
    page = replace_table(page, RESULTS.name, epochs_table(content))
    return replace_table(page, "estimators.json, sizes", sizes_table(content))


if __name__ == "__main__":
    warnings.simplefilter("ignore", ConvergenceWarning)
    content = {
        "command": "python benchmarks/estimators.py",
        "machine": asdict(describe(allocator="as it is")),
        "settings": {"rounds": ROUNDS, "epochs": EPOCHS, "batch": BATCH, "work_per_thread": threads.WORK_PER_THREAD},
        "epochs": epochs(),
        "fits": whole_fits(),
        "sizes": sizes(),
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    PAGE.write_text(filled(PAGE.read_text(), content))
