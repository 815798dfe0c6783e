"""The worked example: one neuron, one mini-batch, every number of batch normalization.

The figures come from the library's own layer, run in float64; this file only arranges them.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.diagnostics.explain import Calculation, explain
from batchnorm.errors import DataError, InputError
from batchnorm.kernels import reference
from batchnorm.lab.data.columns import running_index
from batchnorm.lab.data.tables import Table
from batchnorm.lab.teaching.worked_text import worked_text
from batchnorm.lab.training.network import ACTIVATIONS
from batchnorm.nn import BatchNorm1d

__all__ = ["NOTES", "MiniBatch", "WorkedExample", "from_table", "worked_example"]

REPEATS = 100
ROWS = 4


@dataclass(frozen=True)
class MiniBatch:
    """A few rows of two features x1, x2, and what is to be predicted from them.

    Attributes
    ----------
    names : pair of str
        Of the features.
    features : sequence of pairs of float
        x1 and x2 of each row.
    target_name : str
        What the target is called.
    target : sequence of float or None
        One number a row; None leaves out the loss and the gradient step.
    assumed : frozenset of (int, str)
        Cells that are assumed rather than known: the row, counted from 1, and the feature's or target's name.
    """

    names: tuple[str, str]
    features: Sequence[Sequence[float]]
    target_name: str = "target"
    target: Sequence[float] | None = None
    assumed: frozenset[tuple[int, str]] = frozenset()


NOTES = MiniBatch(
    names=("cgpa", "iq"),
    features=((8.9, 100.0), (6.2, 89.0), (9.1, 91.0), (7.7, 76.0)),
    target_name="placed",
    target=(1.0, 0.0, 0.0, 1.0),
    assumed=frozenset({(3, "iq"), (4, "placed")}),
)


@dataclass(frozen=True)
class WorkedExample:
    """The figures of a worked example, as plain numbers, lists and dicts; docs/explain.md names the keys."""

    figures: dict[str, Any]

    def to_json(self) -> str:
        """The figures in full precision."""
        return json.dumps(self.figures, indent=2, allow_nan=False)

    def text(self) -> str:
        """The figures for a reader: plain text of at most 80 columns."""
        return worked_text(self.figures)


def worked_example(
    batch: MiniBatch = NOTES,
    *,
    weights: tuple[float, float] | None = None,
    bias: float | None = None,
    activation: str = "sigmoid",
    learning_rate: float = 0.1,
) -> WorkedExample:
    """Calculate batch normalization of the neuron ``z11 = w1 * x1 + w2 * x2 + b``, before and after g.

    Formulas: Ioffe & Szegedy (2015), algorithms 1 and 2; the layer is `BatchNorm1d` with its default options.

    Parameters
    ----------
    batch : MiniBatch
        At least 3 rows; `NOTES` are those of the notes.
    weights : pair of float or None
        w1 and w2; None takes 1/sd of each feature, rounded to a power of ten.
    bias : float or None
        b; None takes the whole number that brings the mean of z between 0 and 1.
    activation : str
        g: "identity", "sigmoid", "tanh" or "relu".
    learning_rate : float
        Of the gradient step on gamma and beta.

    Returns
    -------
    WorkedExample
        With methods ``text()`` and ``to_json()``.

    Raises
    ------
    DataError
        Fewer than 3 rows, rows that are not pairs, a target of another length, numbers that are not finite.
    InputError
        An unknown activation; weights, bias or learning rate that are not finite, or a learning rate not above 0.

    Examples
    --------
    >>> example = worked_example()
    >>> [round(z_hat, 4) for z_hat in example.figures["before"]["z_hat"]]
    [1.1949, -1.0474, 0.7819, -0.9294]
    """
    x, target = _checked(batch)
    if activation not in ACTIVATIONS:
        raise InputError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if not 0 < learning_rate < math.inf:
        raise InputError(f"learning rate must be finite and above 0; got {learning_rate}")
    moments = reference.moments(x)
    sd = moments.var.sqrt().tolist()
    if weights is None:
        w = torch.tensor([10.0 ** -round(math.log10(s)) if s else 1.0 for s in sd], dtype=x.dtype)
    else:
        w = torch.tensor(weights, dtype=x.dtype)
    if w.shape != (2,) or not w.isfinite().all():
        raise InputError(f"weights must be 2 finite numbers; got {weights}")
    b = float(-math.floor(w @ moments.mean)) if bias is None else bias
    if not math.isfinite(b):
        raise InputError(f"bias must be finite; got {b}")
    z = (x @ w + b).unsqueeze(1)
    _check_size("z", z)
    layer = BatchNorm1d(1, dtype=z.dtype)
    plain = explain(layer, z)
    return WorkedExample(
        {
            "features": list(batch.names),
            "target": None if target is None else batch.target_name,
            "rows": [
                {
                    "row": row,
                    "features": pair.tolist(),
                    "target": None if target is None else target[row - 1].item(),
                    "assumed": [name for name in (*batch.names, batch.target_name) if (row, name) in batch.assumed],
                }
                for row, pair in enumerate(x, 1)
            ],
            "neuron": {
                "weights": w.tolist(),
                "bias": b,
                "chosen_by_us": weights is None and bias is None,
                "feature_sd": sd,
                "activation": activation,
                "z": z.flatten().tolist(),
            },
            "eps": plain.eps,
            "momentum": plain.momentum,
            "learning_rate": learning_rate,
            "bound": plain.bound,
            "before": _place(z, None if activation == "identity" else activation, target, learning_rate),
            "after": _place(ACTIVATIONS[activation]()(z), None, target, learning_rate),
            "other_batch": {"rows": list(range(1, len(x))), **_normalised(explain(layer, z[:-1]).training)},
            "kept": {
                "learned": [name for name, _ in layer.named_parameters()],
                "not_learned": [name for name, tensor in layer.named_buffers() if tensor.is_floating_point()],
                "numbers_per_neuron": sum(t.numel() for t in layer.state_dict().values() if t.is_floating_point()),
            },
        }
    )


def _checked(batch: MiniBatch) -> tuple[Tensor, Tensor | None]:
    """The features (rows, 2) and the target (rows,), once they are known to be usable."""
    count = len(batch.features)
    if count < 3:
        raise DataError(f"the worked example must have at least 3 rows; got {count}")
    if any(len(row) != 2 for row in batch.features):
        raise DataError(f"each row must have 2 features; got {[len(row) for row in batch.features]}")
    if batch.target is not None and len(batch.target) != count:
        raise DataError(f"the target must have one number for each of the {count} rows; got {len(batch.target)}")
    x = torch.tensor(batch.features, dtype=torch.float64)
    target = None if batch.target is None else torch.tensor(batch.target, dtype=torch.float64)
    for name, values in ((", ".join(batch.names), x), (batch.target_name, target)):
        if values is not None and not values.isfinite().all():
            raise DataError(f"{name} must be finite numbers; got {values.tolist()}")
        if values is not None:
            _check_size(name, values)
    columns = batch.names if target is None else (*batch.names, batch.target_name)
    for row, name in sorted(batch.assumed):
        if not (1 <= row <= count and name in columns):
            raise DataError(
                f"an assumed cell must be in rows 1 to {count} of {', '.join(columns)}; got {name} of {row}"
            )
    return x, target


def _check_size(name: str, values: Tensor) -> None:
    """Raise unless the sums of squares that variance and loss are made of stay finite."""
    if not (4 * values * values).sum().isfinite():
        raise DataError(f"{name} must be numbers whose squares are finite; got {values.flatten().tolist()}")


def _normalised(calculation: Calculation) -> dict[str, Any]:
    """The statistics of the one channel, and what they make of each row."""
    statistics = {name: getattr(calculation, name).item() for name in ("mean", "var", "sd")}
    return {**statistics, "z_hat": calculation.z_hat.flatten().tolist()}


def _place(x: Tensor, activation: str | None, target: Tensor | None, learning_rate: float) -> dict[str, Any]:
    """All figures of a layer that normalises x (rows, 1)."""
    layer = BatchNorm1d(1, dtype=x.dtype, activation=activation)  # type: ignore[arg-type]  # checked above
    first = explain(layer, x)
    step = None if target is None else _gradient_step(copy.deepcopy(layer), x, target, learning_rate)
    running, seen = [], 0
    for batches in (0, 1, REPEATS):
        for _ in range(seen, batches):
            layer(x)
        seen = batches
        inference = explain(layer, x).inference
        assert inference is not None
        running.append({"batches": batches, **_normalised(inference)})
    return {
        "input": x.flatten().tolist(),
        **_normalised(first.training),
        "unbiased_var": first.unbiased_var.item(),
        "gamma": layer.weight.item(),
        "beta": layer.bias.item(),
        "y": first.training.y.flatten().tolist(),
        "output": first.training.output.flatten().tolist(),
        "step": step,
        "running": running,
    }


@torch.enable_grad()
def _gradient_step(layer: BatchNorm1d, x: Tensor, target: Tensor, learning_rate: float) -> dict[str, Any]:
    """One step of gradient descent on gamma and beta, for the squared error of the layer's output."""
    start = [layer.weight.item(), layer.bias.item()]
    loss = F.mse_loss(layer(x).flatten(), target)
    gradients = torch.autograd.grad(loss, [layer.weight, layer.bias])
    with torch.no_grad():
        layer.weight.sub_(learning_rate * gradients[0])
        layer.bias.sub_(learning_rate * gradients[1])
    new = [layer.weight.item(), layer.bias.item()]
    step: dict[str, Any] = {
        name: {"value": before, "gradient": gradient.item(), "new": after}
        for name, before, gradient, after in zip(("gamma", "beta"), start, gradients, new, strict=True)
    }
    return step | {"loss": {"value": loss.item(), "new": F.mse_loss(layer(x).flatten(), target).item()}}


def from_table(table: Table) -> MiniBatch:
    """The first 4 complete rows: two columns of numbers that are no index, and the target where it is a number."""
    frame = table.frame
    columns = [c for c in frame.iter_columns() if c.dtype.is_numeric() and c.name != table.target]
    names = [column.name for column in columns if not running_index(column)][:2]
    if len(names) < 2:
        raise DataError(
            f"the worked example must have 2 columns of numbers besides the target; got {', '.join(names) or 'none'}"
        )
    kind = frame.schema[table.target]
    targets = [table.target] if kind.is_numeric() or kind == pl.Boolean else []
    numbers = frame.select(pl.col(names + targets).cast(pl.Float64))
    rows = numbers.filter(pl.all_horizontal(pl.all().is_finite())).head(ROWS)
    target = rows[table.target].to_list() if targets else None
    return MiniBatch((names[0], names[1]), rows.select(names).rows(), table.target, target)
