"""Built-in data sets: those of scikit-learn, and one that is generated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl

__all__ = ["BUILT_IN", "placement"]


def placement(rows: int = 1000, seed: int = 0) -> pl.DataFrame:
    """Generate students' cgpa and iq and whether they were placed; the same seed gives the same rows.

    cgpa is normal (mean 7, sd 1.2, clipped to 3 to 10), iq normal (mean 110, sd 25, whole numbers); the chance of a
    place is logistic in cgpa - 6.5 (weight 2 per point) and iq - 110 (weight 0.02 per point). The numbers are made up,
    not surveyed.

    >>> placement(3).columns
    ['cgpa', 'iq', 'placed']
    """
    generator = np.random.default_rng(seed)
    cgpa = np.clip(generator.normal(7.0, 1.2, rows), 3.0, 10.0).round(1)
    iq = generator.normal(110.0, 25.0, rows).round()
    chance = 1 / (1 + np.exp(-(2.0 * (cgpa - 6.5) + 0.02 * (iq - 110.0))))
    placed = (generator.random(rows) < chance).astype(np.int64)
    return pl.DataFrame({"cgpa": cgpa, "iq": iq, "placed": placed})


def _scikit_learn(name: str) -> pl.DataFrame:
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    features = pl.DataFrame(bunch.data, schema=[str(column) for column in bunch.feature_names])
    return features.with_columns(pl.Series("target", bunch.target))


BUILT_IN: dict[str, Callable[[], pl.DataFrame]] = {
    "digits": lambda: _scikit_learn("digits"),
    "breast_cancer": lambda: _scikit_learn("breast_cancer"),
    "wine": lambda: _scikit_learn("wine"),
    "diabetes": lambda: _scikit_learn("diabetes"),
    "placement": placement,
}
