"""The worked example: one neuron, one mini-batch, every number of batch normalization.

The figures come from the library's own layer, run in float64; this file only arranges them.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.diagnostics.explain import explain
from batchnorm.errors import DataError, InputError
from batchnorm.kernels import reference
from batchnorm.lab.teaching.figures import (
    ExampleRow,
    Figures,
    GradientStep,
    KeptNumbers,
    LayerFigures,
    LossStep,
    Neuron,
    OtherBatch,
    ParameterStep,
    RunningFigures,
)
from batchnorm.lab.teaching.mini_batch import NOTES, MiniBatch
from batchnorm.lab.teaching.worked_text import worked_text
from batchnorm.lab.training.network import ACTIVATIONS
from batchnorm.nn import BatchNorm1d
from batchnorm.reports import Report

__all__ = ["NOTES", "MiniBatch", "WorkedExample", "worked_example"]

REPEATS = 100


@dataclass(frozen=True, repr=False)
class WorkedExample(Figures, Report):
    """The figures of a worked example; ``str()`` is plain text of at most 80 columns."""

    def to_json(self) -> str:
        """Return the figures as JSON, in full precision."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def _blocks(self) -> Iterable[str]:
        return worked_text(self)

    def _summary(self) -> str:
        return f"{self.neuron.activation} of {' and '.join(self.features)}, {len(self.rows)} rows"

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"row": row.row, "z": self.neuron.z[i]}
            | {f"z_hat_{placement}": layer.z_hat[i] for placement, layer in self._layers()}
            | {f"output_{placement}": layer.output[i] for placement, layer in self._layers()}
            for i, row in enumerate(self.rows)
        ]

    def _layers(self) -> Sequence[tuple[str, LayerFigures]]:
        return ("before", self.before), ("after", self.after)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


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
        w1 and w2; None means 1/sd of each feature, rounded to a power of ten.
    bias : float or None
        b; None means the whole number that brings the mean of z between 0 and 1.
    activation : str
        g: "identity", "sigmoid", "tanh" or "relu".
    learning_rate : float
        Learning rate of the gradient step on gamma and beta.

    Returns
    -------
    WorkedExample
        Every figure as an attribute; print it for the calculation, step by step.

    Raises
    ------
    DataError
        There are fewer than 3 rows, rows that are not pairs, a target of another length, or numbers that are not
        finite.
    InputError
        The activation is unknown; weights, bias or learning rate are not finite, or the learning rate is not positive.

    Examples
    --------
    >>> example = worked_example()
    >>> [round(z_hat, 4) for z_hat in example.before.z_hat]
    [1.1949, -1.0474, 0.7819, -0.9294]
    """
    x, target = _checked(batch)
    if activation not in ACTIVATIONS:
        raise InputError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if not 0 < learning_rate < math.inf:
        raise InputError(f"learning_rate must be positive and finite; got {learning_rate}")
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
    explanation = explain(layer, z)
    other = explain(layer, z[:-1]).training
    return WorkedExample(
        features=list(batch.names),
        target=None if target is None else batch.target_name,
        rows=_rows(batch, x, target),
        remarks=list(batch.remarks),
        neuron=Neuron(
            weights=w.tolist(),
            bias=b,
            chosen_by_us=weights is None and bias is None,
            feature_sd=sd,
            activation=activation,
            z=z.flatten().tolist(),
        ),
        eps=explanation.eps,
        momentum=explanation.momentum,
        learning_rate=learning_rate,
        bound=explanation.bound,
        before=_layer_figures(z, None if activation == "identity" else activation, target, learning_rate),
        after=_layer_figures(ACTIVATIONS[activation]()(z), None, target, learning_rate),
        other_batch=OtherBatch(
            rows=list(range(1, len(x))),
            mean=other.mean.item(),
            var=other.var.item(),
            sd=other.sd.item(),
            z_hat=other.z_hat.flatten().tolist(),
        ),
        kept=KeptNumbers(
            learned=[name for name, _ in layer.named_parameters()],
            not_learned=[name for name, tensor in layer.named_buffers() if tensor.is_floating_point()],
            numbers_per_neuron=sum(t.numel() for t in layer.state_dict().values() if t.is_floating_point()),
        ),
    )


def _checked(batch: MiniBatch) -> tuple[Tensor, Tensor | None]:
    """Return the features (rows, 2) and the target (rows,), once it is sure that they are usable."""
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
    """Raise `DataError` unless the sums of squares in variance and loss stay finite."""
    if not (4 * values * values).sum().isfinite():
        raise DataError(f"{name} must be numbers whose squares are finite; got {values.flatten().tolist()}")


def _rows(batch: MiniBatch, x: Tensor, target: Tensor | None) -> list[ExampleRow]:
    columns = (*batch.names, batch.target_name)
    return [
        ExampleRow(
            row=row,
            features=pair.tolist(),
            target=None if target is None else target[row - 1].item(),
            assumed=[name for name in columns if (row, name) in batch.assumed],
        )
        for row, pair in enumerate(x, 1)
    ]


def _layer_figures(x: Tensor, activation: str | None, target: Tensor | None, learning_rate: float) -> LayerFigures:
    """Return all figures of a layer that normalizes x (rows, 1)."""
    layer = BatchNorm1d(1, dtype=x.dtype, activation=activation)  # type: ignore[arg-type]  # it was checked
    explanation = explain(layer, x)
    training = explanation.training
    step = None if target is None else _gradient_step(copy.deepcopy(layer), x, target, learning_rate)
    running, seen = [], 0
    for batches in (0, 1, REPEATS):
        for _ in range(seen, batches):
            layer(x)
        seen = batches
        running.append(_running_figures(layer, x, batches))
    return LayerFigures(
        input=x.flatten().tolist(),
        mean=training.mean.item(),
        var=training.var.item(),
        sd=training.sd.item(),
        z_hat=training.z_hat.flatten().tolist(),
        unbiased_var=explanation.unbiased_var.item(),
        gamma=layer.weight.item(),
        beta=layer.bias.item(),
        y=training.y.flatten().tolist(),
        output=training.output.flatten().tolist(),
        step=step,
        running=running,
    )


def _running_figures(layer: BatchNorm1d, x: Tensor, batches: int) -> RunningFigures:
    inference = explain(layer, x).inference
    assert inference is not None
    return RunningFigures(
        batches=batches,
        mean=inference.mean.item(),
        var=inference.var.item(),
        sd=inference.sd.item(),
        z_hat=inference.z_hat.flatten().tolist(),
    )


@torch.enable_grad()
def _gradient_step(layer: BatchNorm1d, x: Tensor, target: Tensor, learning_rate: float) -> GradientStep:
    """Take one step of gradient descent on gamma and beta, for the squared error of the layer's output."""
    gamma, beta = layer.weight.item(), layer.bias.item()
    loss = F.mse_loss(layer(x).flatten(), target)
    gradients = torch.autograd.grad(loss, [layer.weight, layer.bias])
    with torch.no_grad():
        layer.weight.sub_(learning_rate * gradients[0])
        layer.bias.sub_(learning_rate * gradients[1])
    return GradientStep(
        gamma=ParameterStep(gamma, gradients[0].item(), layer.weight.item()),
        beta=ParameterStep(beta, gradients[1].item(), layer.bias.item()),
        loss=LossStep(loss.item(), F.mse_loss(layer(x).flatten(), target).item()),
    )
