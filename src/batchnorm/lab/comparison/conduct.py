"""The main job: the same network without batch normalization, with it before and with it after the nonlinearity.

A search chooses each arm's learning rate, fresh seeds confirm it, variants of the set-up are tried, and the time
of a step is measured. Training is done in stacks (see `train`), spread over processes of one thread each.
"""

from __future__ import annotations

import math
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError

from batchnorm.errors import RunError
from batchnorm.kernels.allocator import tune_allocator
from batchnorm.lab.claims import Claim, Study, judge_claims
from batchnorm.lab.comparison.measures import choose_rate, choose_target, summarise_rates
from batchnorm.lab.comparison.result import evaluate
from batchnorm.lab.comparison.run_file import RunFile
from batchnorm.lab.data.dataset import Dataset
from batchnorm.lab.training.records import RecordName
from batchnorm.lab.training.runs import Target, evaluation_steps
from batchnorm.lab.training.settings import ARMS, Arm, Inputs, Settings, neighboring_rate
from batchnorm.lab.training.stacks import Stack, cut
from batchnorm.lab.training.train import seconds_per_step, train

__all__ = ["Progress", "compare", "fit_to_data", "variants"]

VARIANT_FACTORS = (-1, 0, 1)
POLL_SECONDS = 0.2


class Progress(Protocol):
    """Who is told how far the training is, in gradient steps of single runs."""

    def plan(self, arm: str, steps: int) -> None:
        """Some more steps are to be taken by an arm's runs."""

    def advance(self, arm: str, steps: int) -> None:
        """Some steps were taken by an arm's runs."""

    def say(self, sentence: str) -> None:
        """Something happened that the user should know."""


def fit_to_data(settings: Settings, dataset: Dataset) -> tuple[Settings, str | None]:
    """The settings with a batch size no larger than the training rows, and what was changed."""
    rows = len(dataset.parts["train"])
    if settings.batch_size <= rows:
        return settings, None
    return replace(settings, batch_size=rows), (
        f"the batch size of {settings.batch_size} is reduced to the {rows} training rows"
    )


def _train_stack(
    stack: Stack, dataset: Dataset, taken: np.memmap[Any, Any], index: int, main_process: int
) -> dict[str, Any]:
    """Train one stack on one thread and put it in the form that run.json holds; runs in a worker."""
    if os.getpid() != main_process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the main one sees to it
        tune_allocator()  # the worker is ours alone

    def progress(step: int) -> None:
        taken[index] = step

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.perf_counter()
    try:
        runs = train(stack, dataset, progress)
    finally:
        torch.set_num_threads(threads)
    return {
        "key": stack.key,
        "phase": stack.phase,
        "arm": stack.arm,
        "seconds": round(time.perf_counter() - started, 3),
        "runs": [run.to_json() for run in runs],
    }


class _Watch(threading.Thread):
    """Tells how many steps the workers have taken, from the numbers that they leave in a shared file."""

    def __init__(self, stacks: Sequence[Stack], taken: np.memmap[Any, Any], progress: Progress) -> None:
        super().__init__(daemon=True)
        self.stacks, self.taken, self.progress = stacks, taken, progress
        self.told = [0] * len(stacks)
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(POLL_SECONDS):
            for index, stack in enumerate(self.stacks):
                self.tell(index, stack, int(self.taken[index]))

    def tell(self, index: int, stack: Stack, steps: int) -> None:
        """Tell of the steps not yet told of."""
        self.progress.advance(stack.arm, (steps - self.told[index]) * len(stack.seeds))
        self.told[index] = steps

    def stop(self) -> None:
        """Tell no more of the workers."""
        self.over.set()
        self.join()

    def finish(self) -> None:
        """Count as taken the steps that stacks stopped early did not need."""
        for index, stack in enumerate(self.stacks):
            self.tell(index, stack, stack.settings.steps)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Keep Ctrl-C from the processes started here while they start, and from this one until the block ends."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


class _Workers:
    """Trains stacks in processes and keeps each in run.json as it is finished."""

    def __init__(self, dataset: Dataset, run: RunFile, jobs: int, progress: Progress) -> None:
        self.dataset, self.run, self.jobs, self.progress = dataset, run, jobs, progress

    def train(self, stacks: Sequence[Stack]) -> None:
        """Train the stacks that run.json does not hold yet."""
        finished = {stack["key"] for stack in self.run.content["stacks"]}
        waiting = [stack for stack in stacks if stack.key not in finished]
        for stack in stacks:
            if stack.key in finished:
                self.progress.advance(stack.arm, stack.settings.steps * len(stack.seeds))
        if not waiting:
            return
        with tempfile.NamedTemporaryFile() as file:
            taken: np.memmap[Any, Any] = np.memmap(file.name, np.int64, "w+", shape=(len(waiting),))
            watch = _Watch(waiting, taken, self.progress)
            parallel = Parallel(n_jobs=self.jobs, return_as="generator_unordered")
            with _no_interrupt():
                results = parallel(
                    delayed(_train_stack)(stack, self.dataset, taken, i, os.getpid()) for i, stack in enumerate(waiting)
                )
            watch.start()
            try:
                for result in results:
                    self.run.content["stacks"].append(result)
                    self.run.save()
            except TerminatedWorkerError as error:
                raise RunError(
                    f"training must not be ended from outside (is there memory for {self.jobs} jobs?); "
                    f"what is finished is kept, and --resume {self.run.folder} goes on"
                ) from error
            finally:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # joblib's, that tasks are cancelled: so they should be
                    results.close()
                watch.stop()
            watch.finish()


def _search(workers: _Workers, settings: Settings) -> tuple[Target, dict[Arm, float], list[float]]:
    """Search the learning rates of every arm, and one more beyond an edge of the grid where the best is there."""
    seeds = range(settings.search_seeds)
    rows = len(workers.dataset.parts["validation"])
    evaluations = evaluation_steps(settings.steps)
    tried: list[float] = []
    new = list(settings.grid)
    while new:
        pairs = [(rate, seed) for rate in new for seed in seeds]
        name = "search" if not tried else f"search beyond {tried[0]:g} to {tried[-1]:g}"
        workers.train([s for arm in reversed(ARMS) for s in cut(name, "search", arm, pairs, settings)])
        extended = bool(tried)
        tried = sorted([*tried, *new])
        target = choose_target(
            workers.run.runs("search", "none"),
            task=workers.dataset.task,
            validation_rows=rows,
            constant_loss=workers.dataset.constant_loss,
            target_score=settings.target_score,
        )
        chosen: dict[Arm, float] = {
            arm: choose_rate(summarise_rates(workers.run.runs("search", arm), target, evaluations)) for arm in ARMS
        }
        new = []
        if settings.learning_rates is None and not extended:
            new += [neighboring_rate(tried[0], -1)] if tried[0] in chosen.values() else []
            new += [neighboring_rate(tried[-1], 1)] if tried[-1] in chosen.values() else []
            for rate in new:
                for arm in ARMS:
                    workers.progress.plan(arm, settings.search_seeds * settings.steps)
                workers.progress.say(f"The best learning rate is at the edge of the grid: {rate:g} is tried too.")
    return target, chosen, tried


def _confirm(settings: Settings, chosen: dict[Arm, float], records: tuple[RecordName, ...]) -> list[Stack]:
    """The chosen learning rates on fresh seeds, the same ones for every arm."""
    seeds = range(settings.search_seeds, settings.search_seeds + settings.seeds)
    stacks = []
    for arm in reversed(ARMS):
        pairs = [(chosen[arm], seed) for seed in seeds]
        pieces = cut("confirm", "confirm", arm, pairs, settings, test=True, records=records)
        stacks += [replace(pieces[0], trace=True), *pieces[1:]]
    return stacks


def variants(settings: Settings) -> dict[str, Settings]:
    """Set-ups that differ from the one asked for in one thing, to be trained for half the steps."""
    other: Inputs = "unscaled" if settings.inputs == "standardized" else "standardized"
    shorter = replace(settings, steps=settings.variant_steps)
    return {
        "initial weights x 0.1": replace(shorter, init_scale=settings.init_scale * 0.1),
        f"inputs {other}": replace(shorter, inputs=other),
    }


def _vary(settings: Settings, target: Target, chosen: dict[Arm, float], tried: list[float]) -> list[Stack]:
    """The variants, at the chosen learning rate and those beside it, each until most seeds of one of them arrive."""
    stacks = []
    for arm in ARMS:  # the one that is least likely to arrive, and so to stop early, first
        for name, varied in variants(settings).items():
            near = {neighboring_rate(chosen[arm], step) for step in VARIANT_FACTORS}
            rates = [rate for rate in tried if rate in near]
            pairs = [(rate, seed) for rate in rates for seed in range(settings.search_seeds)]
            stacks += cut(name, f"variant: {name}", arm, pairs, varied, stop=target)
    return stacks


def compare(
    dataset: Dataset, settings: Settings, run: RunFile, *, jobs: int, progress: Progress, claims: Sequence[Claim] = ()
) -> dict[str, Any]:
    """Compare the arms, keep everything in run.json as it is finished, and return the result (see docs/compare.md).

    ``claims`` are measured beside. Finished stacks that run.json holds already are not trained again. Ctrl-C leaves
    the file with what is finished, marked as interrupted.
    """
    workers = _Workers(dataset, run, jobs, progress)
    started = time.perf_counter()
    before = run.content.get("seconds", 0.0)
    for arm in ARMS:
        progress.plan(arm, (len(settings.grid) * settings.search_seeds + settings.seeds) * settings.steps)
    run.content["status"] = "running"
    run.save()
    try:
        target, chosen, tried = _search(workers, settings)
        run.content["result"] = evaluate(run, dataset, settings, target, chosen)
        others = _vary(settings, target, chosen, tried) if math.isfinite(target.value) else []
        study = Study(dataset, settings, run, target, chosen, tried)
        others += [stack for claim in claims for stack in claim.stacks(study)]
        for stack in others:
            progress.plan(stack.arm, stack.settings.steps * len(stack.seeds))
        records = tuple(dict.fromkeys(record for claim in claims for record in claim.records))
        workers.train(_confirm(settings, chosen, records) + others)
        timed = seconds_per_step(dataset, chosen, settings)
        result = evaluate(run, dataset, settings, target, chosen, timed)
        run.content["result"] = result
        if claims:
            result |= judge_claims(study, claims)
        run.content["status"] = "complete"
    except KeyboardInterrupt:
        run.content["status"] = "interrupted"
        raise
    finally:
        run.content["seconds"] = round(before + time.perf_counter() - started, 1)
        run.save()
    return result
