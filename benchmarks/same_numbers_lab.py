"""Cases of same_numbers.py that need the extra `lab`: estimators, comparisons, studies and the command line."""

from __future__ import annotations

import functools
import io
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl
from numpy.typing import NDArray
from same_numbers_values import Values, numbers_in, prefixed, sorted_numbers
from sklearn.datasets import load_diabetes, load_digits, load_iris, load_wine
from sklearn.preprocessing import StandardScaler

import batchnorm as bn
from batchnorm.cli import main as command_line

__all__ = ["LAB_GROUPS", "fitted_classifier"]

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"batch_norm": "after", "activation": "tanh", "solver": "sgd"},
    {"batch_norm": None, "activation": "sigmoid", "hidden_layer_sizes": (8,)},
    {"early_stopping": True, "validation_fraction": 0.3, "alpha": 0.1},
    {"activation": "identity", "shuffle": False, "bn_momentum": 0.5, "bn_eps": 0.01, "init_scale": 0.5},
    {"solver": "sgd", "nesterovs_momentum": False, "learning_rate_init": 0.1, "batch_size": 31},
    {"tol": 10.0, "n_iter_no_change": 1, "max_iter": 10, "bn_momentum": 1.0},
)


def steady_clock() -> AbstractContextManager[Any]:
    """Make the clock advance evenly, so that the numbers calculated from measured times are the same in every run."""
    return mock.patch("time.perf_counter", itertools.count(0.0, 1 / 1024).__next__)


def run_values(run: dict[str, Any]) -> Values:
    """Yield the numbers of run.json: the training curves of each arm, the result, and the digest of the data."""
    for arm in ("none", "before", "after"):
        yield f"runs {arm}", sorted_numbers([stack for stack in run["stacks"] if stack["arm"] == arm])
    yield "result", sorted_numbers(run["result"])
    yield "sha256 of the data", np.frombuffer(bytes.fromhex(run["data"]["sha256"]), np.uint8)


def comparison_values(found: Any) -> Values:
    """Yield the numbers of a comparison: its run, and the rows of its tables in their order."""
    yield from run_values(json.loads((found.folder / "run.json").read_text(encoding="utf-8")))
    for row, values in enumerate((found.frame() if hasattr(found, "frame") else found.table()).iter_rows()):
        yield f"table, row {row}", np.array(list(numbers_in(values)))
    for row, values in enumerate(found.verdicts().iter_rows()):
        yield f"verdicts, row {row}", np.array(list(numbers_in(values)))


def sample_weights(rows: int) -> NDArray[np.float64]:
    """Return a weight per row, some of them 0."""
    return np.arange(rows) % 4 / 2


def fit_values(model: Any, X: NDArray[Any]) -> Values:
    """Yield the loss curve, the weights and the predictions of a fitted estimator."""
    yield "losses", np.array(model.loss_curve_)
    yield "validation scores", np.array(model.validation_scores_ or [], dtype=np.float64)
    yield "best loss, epochs and rows", np.array(list(numbers_in([model.best_loss_, model.n_iter_, model.t_])))
    yield from prefixed("network", model.network_.state_dict().items())
    for number, (weight, intercept) in enumerate(zip(model.coefs_, model.intercepts_, strict=True)):
        yield f"weight {number}", weight
        yield f"intercept {number}", intercept
    yield "predictions", model.predict(X).astype(np.float64)
    if hasattr(model, "predict_proba"):
        yield "probabilities", np.array(model.predict_proba(X))
        yield "log probabilities", np.array(model.predict_log_proba(X))


def data_sets() -> Iterator[tuple[str, Callable[..., Any], NDArray[Any], NDArray[Any]]]:
    """Yield small data sets and the estimators for them, with one and with several outputs."""
    flowers, species = load_iris(return_X_y=True)
    flowers = StandardScaler().fit_transform(flowers)
    patients, progression = load_diabetes(return_X_y=True)
    patients, progression = StandardScaler().fit_transform(patients[:120]), progression[:120] / 100
    several = np.stack([progression, -progression], axis=1)
    yield "iris", bn.BatchNormMLPClassifier, flowers, species
    yield "iris, float32", bn.BatchNormMLPClassifier, flowers.astype(np.float32), species
    yield "iris, two classes", bn.BatchNormMLPClassifier, flowers[:100], species[:100]
    yield "iris, several labels", bn.BatchNormMLPClassifier, flowers, np.stack([species > 0, species > 1], axis=1) * 1
    yield "diabetes", bn.BatchNormMLPRegressor, patients, progression
    yield "diabetes, float32", bn.BatchNormMLPRegressor, patients.astype(np.float32), progression
    yield "diabetes, several targets", bn.BatchNormMLPRegressor, patients, several


def estimators() -> Values:
    """Yield fits of the classifier and the regressor, with weights, warm starts and partial fits."""
    for (name, make, X, y), (number, given) in itertools.product(data_sets(), enumerate(SETTINGS)):
        options = {"learning_rate_init": 0.001, "batch_size": 40, "max_iter": 2, "random_state": 0, **given}
        options = {"hidden_layer_sizes": (12, 6), **options}
        label = f"{name}, settings {number}"
        yield from prefixed(label, fit_values(make(**options).fit(X, y), X))
        yield from prefixed(
            f"{label}, weighted", fit_values(make(**options).fit(X, y, sample_weight=sample_weights(len(X))), X)
        )
        warm = make(**options, warm_start=True)
        yield from prefixed(f"{label}, warm", fit_values(warm.fit(X, y).fit(X[::2], y[::2]), X))
        if not warm.early_stopping:
            classes = {"classes": np.unique(y)} if "iris" in name else {}
            partial = make(**options).partial_fit(X, y, **classes).partial_fit(X[::3], y[::3])
            yield from prefixed(f"{label}, partial", fit_values(partial, X))


def mixed_columns() -> tuple[pl.DataFrame, NDArray[Any]]:
    """Return a table of numbers, categories, booleans and missing values, and a target of texts."""
    random = np.random.default_rng(0)
    numbers, kinds = random.normal(size=150), random.choice(["a", "b", "c"], 150)
    gaps = [None if value > 1 else value for value in random.normal(size=150).tolist()]
    frame = pl.DataFrame({"number": numbers, "kind": kinds, "gaps": gaps, "positive": numbers > 0, "index": range(150)})
    return frame, np.where(numbers + (kinds == "a") + random.normal(size=150) / 4 > 0, "yes", "no")


def comparisons() -> Values:
    """Yield comparisons of several networks, optimizers and kinds of data."""
    digits, labels = load_digits(return_X_y=True)
    few_rates = {"learning_rates": (0.3, 3.0), "seed": 3}
    cases: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "wine": (*load_wine(return_X_y=True), {"hidden": (16, 16)}),
        "digits": (digits[:600], labels[:600], {"hidden": (12,), "activation": "relu", **few_rates}),
        "diabetes": (*load_diabetes(return_X_y=True), {"optimizer": "adam", "inputs": "unscaled", "hidden": (8, 8)}),
        "mixed": (*mixed_columns(), {"init": "gaussian:0.1", "activation": "tanh", "hidden": (8,), **few_rates}),
    }
    for name, (X, y, settings) in cases.items():
        with steady_clock():
            found = bn.lab.compare(X, y, steps=40, seeds=3, search_seeds=2, jobs=1, **settings)
        yield from prefixed(name, comparison_values(found))


@functools.cache
def found_studies() -> dict[str, Any]:
    """Return studies of all claims, with enough seeds for verdicts."""
    digits, labels = load_digits(return_X_y=True)
    settings: dict[str, Any] = {"hidden": (12, 12), "search_seeds": 1, "seeds": 5, "jobs": 1, "activation": "relu"}
    with steady_clock():
        return {
            "iris": bn.lab.study(*load_iris(return_X_y=True), steps=40, **settings),
            "digits": bn.lab.study(digits[:500], labels[:500], steps=60, learning_rates=(0.1, 1.0, 10.0), **settings),
        }


def studies() -> Values:
    """Yield the numbers of studies of all claims."""
    for name, found in found_studies().items():
        yield from prefixed(name, comparison_values(found))


def figures() -> Values:
    """Yield the numbers that the figures of studies draw."""
    for name, found in found_studies().items():
        for number, shown in enumerate(found.figures.values()):
            drawn = sorted_numbers(shown.figure)
            yield f"{name}: figure {number}", drawn[~np.isnan(drawn)]  # a gap may be NaN or None


def fitted_classifier() -> Any:
    """Return the classifier that the command line tests for a shift."""
    X, y = load_digits(return_X_y=True)
    return bn.BatchNormMLPClassifier((16,), learning_rate_init=0.001, max_iter=5, random_state=0).fit(X[:900], y[:900])


def output_of(*arguments: str) -> str:
    """Return what the command line prints."""
    printed = io.StringIO()
    with mock.patch.object(sys, "argv", ["batchnorm", *arguments]), redirect_stdout(printed):
        try:
            command_line()
        except SystemExit as end:
            if end.code:
                raise
    return printed.getvalue()


def commands() -> Values:
    """Yield the numbers of the command line's JSON: the worked example, a shift, and a comparison of generated data."""
    for activation in ("identity", "sigmoid", "tanh", "relu"):
        example = json.loads(output_of("explain", "--json", "--activation", activation))
        yield f"explain, {activation}", sorted_numbers(example)
    yield "explain, wine", sorted_numbers(json.loads(output_of("explain", "wine", "--json")))
    served = f"{__name__}:{fitted_classifier.__name__}"
    yield "shift", sorted_numbers(json.loads(output_of("shift", served, "digits", "--target", "target", "--json")))
    with tempfile.TemporaryDirectory() as folder, steady_clock():
        short = ("--steps", "40", "--seeds", "2", "--hidden", "8", "--rows", "200", "--jobs", "1", "--quiet")
        output_of("compare", "placement", *short, "--out", folder)
        yield from run_values(json.loads((Path(folder) / "run.json").read_text(encoding="utf-8")))


LAB_GROUPS: dict[str, Callable[[], Values]] = {
    each.__name__: each for each in (estimators, comparisons, studies, figures, commands)
}
