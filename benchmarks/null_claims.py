"""Measure how often a claim holds where there is no effect: on shuffled labels, and with an arm against itself.

    python benchmarks/null_claims.py --repetitions 200 --out benchmarks/results/null_claims.json

Each repetition is a small but whole study: breast_cancer, 2 hidden layers of 8 units, 10 seeds. It has its own split,
its own seeds and its own shuffle of the labels. The results count how often each claim holds, and how often any does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, cpu_count, delayed
from scipy.stats import binomtest

from batchnorm.lab.claims import CLAIMS, ClaimTests, read_judgment
from batchnorm.lab.comparison.conduct import compare
from batchnorm.lab.comparison.run_file import RunFile
from batchnorm.lab.data.dataset import prepare
from batchnorm.lab.data.tables import read_table
from batchnorm.lab.json_records import to_json
from batchnorm.lab.report.terminal import Silence
from batchnorm.lab.training.settings import Settings

QUICK = Settings(
    hidden=(8, 8), activation="tanh", batch_size=32, learning_rates=(0.1, 0.3), search_seeds=2, seeds=10, steps=80
)
CHECKS = ("shuffled labels", "an arm against itself")


def study(check: str, repetition: int) -> list[tuple[str, str]]:
    """Return the verdicts of one study, such as ("fewer_steps, fewer steps, before", "undecided")."""
    torch.set_num_threads(1)
    settings, claims = replace(QUICK, seed=repetition), list(CLAIMS)
    dataset = prepare(read_table("breast_cancer"), seed=repetition)
    if check == "shuffled labels":
        dataset = replace(dataset, y=np.random.default_rng(repetition).permutation(dataset.y))
    else:
        settings = replace(settings, null_arm="before")
        claims = [name for name in claims if name != "inputs"]  # it compares no arms
    with tempfile.TemporaryDirectory() as folder:
        run = RunFile.create(Path(folder), dataset.describe(), settings)
        compare(dataset, run, jobs=1, progress=Silence(), extension=ClaimTests(claims))
        judgment = read_judgment(run)
    assert judgment is not None
    return [
        (f"{claim.name}, {finding.label}, {finding.subject}", finding.verdict)
        for claim in judgment.claims
        for finding in claim.findings
    ]


def rate(count: int, repetitions: int) -> dict[str, Any]:
    """Return a count, and its share with an exact 95% interval."""
    interval = binomtest(count, repetitions).proportion_ci()
    return {"holds": count, "share": count / repetitions, "interval": [interval.low, interval.high]}


def main() -> None:
    """Run both checks and write their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=cpu_count())
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    repetitions = arguments.repetitions
    report: dict[str, Any] = {
        "command": f"python benchmarks/null_claims.py --repetitions {repetitions} --out {arguments.out}",
        "repetitions": repetitions,
        "settings": to_json(QUICK),
        "machine": {"system": platform.system(), "cores": os.cpu_count(), "torch": str(torch.__version__)},
        "checks": {},
    }
    for check in CHECKS:
        started = time.perf_counter()
        studies = Parallel(n_jobs=arguments.jobs)(delayed(study)(check, i) for i in range(repetitions))
        holds = Counter(name for verdicts in studies for name, verdict in verdicts if verdict == "holds")
        wrong = sum(any(verdict == "holds" for _, verdict in verdicts) for verdicts in studies)
        report["checks"][check] = {
            "any claim": rate(wrong, repetitions),
            "claims": {name: rate(holds[name], repetitions) for name, _ in studies[0]},
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(f"{check}: some claim holds in {wrong} of {repetitions} studies")  # noqa: T201
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
