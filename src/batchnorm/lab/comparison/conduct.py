"""The comparison: the same network without batch normalization, with it before, and with it after the nonlinearity.

A search chooses each arm's learning rate, fresh seeds confirm it, variants of the set-up are tried, and the time per
step is measured. Training is done in stacks (see `train`), spread over processes of one thread each.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

from batchnorm.lab.comparison.evaluate import evaluate
from batchnorm.lab.comparison.extension import Extension
from batchnorm.lab.comparison.phases import confirming_stacks, most_variant_steps, search, variant_stacks
from batchnorm.lab.comparison.result import Result
from batchnorm.lab.comparison.run_file import RunFile
from batchnorm.lab.comparison.study import Study
from batchnorm.lab.comparison.workers import Progress, Workers
from batchnorm.lab.data.dataset import Dataset
from batchnorm.lab.json_records import to_json
from batchnorm.lab.training.settings import ARMS, Settings
from batchnorm.lab.training.train import seconds_per_step

__all__ = ["compare", "fit_to_data"]


def fit_to_data(settings: Settings, dataset: Dataset) -> tuple[Settings, str | None]:
    """Return the settings with a batch size of at most the training rows, and a note where that changed it."""
    rows = len(dataset.parts["train"])
    if settings.batch_size <= rows:
        return settings, None
    return replace(settings, batch_size=rows), (
        f"the batch size of {settings.batch_size} is reduced to the {rows} training rows"
    )


def compare(
    dataset: Dataset, run: RunFile, *, jobs: int, progress: Progress, extension: Extension | None = None
) -> Result:
    """Compare the arms with the settings of a run, save all in run.json as it is finished, and return the result.

    ``extension`` names what is trained and judged besides. Stacks that run.json already has are not trained again.
    Ctrl-C leaves the file with what is finished, marked as interrupted.
    """
    workers = Workers(dataset, run, jobs, progress)
    settings = run.settings
    started = time.perf_counter()
    before = run.seconds or 0.0
    for arm in ARMS:
        progress.plan(arm, (len(settings.grid) * settings.search_seeds + settings.seeds) * settings.steps)
        progress.plan(arm, most_variant_steps(settings))
    run.status = "running"
    run.save()
    try:
        progress.begin("searching learning rates")
        study = search(workers, settings)
        run.result = evaluate(study)
        _train_the_rest(workers, study, extension)
        progress.begin("timing a step")
        timed = seconds_per_step(dataset, study.chosen, settings)
        run.result = evaluate(study, timed)
        if extension is not None:
            progress.begin("judging the claims")
            run.extension = to_json(extension.judge(study))
        run.status = "complete"
    except KeyboardInterrupt:
        run.status = "interrupted"
        raise
    finally:
        run.seconds = round(before + time.perf_counter() - started, 1)
        run.save()
    return run.result


def _train_the_rest(workers: Workers, study: Study, extension: Extension | None) -> None:
    """Train the confirming runs, the variants of the set-up, and the stacks of the extension."""
    others = variant_stacks(study) if math.isfinite(study.target.value) else []
    others += [] if extension is None else extension.stacks(study)
    for arm in ARMS:
        workers.progress.plan(arm, -most_variant_steps(study.settings))
    for stack in others:
        workers.progress.plan(stack.arm, stack.settings.steps * len(stack.seeds))
    workers.progress.begin("confirming" if extension is None else "confirming and testing claims")
    records = () if extension is None else extension.records
    workers.train(confirming_stacks(study, records) + others)
