"""Every number that a batch normalization layer calculates from one batch."""

from __future__ import annotations

import copy
import math
import textwrap
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.errors import InputError
from batchnorm.functional import batch_norm
from batchnorm.kernels import reference
from batchnorm.text import WIDTH, format_column, format_table
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["Calculation", "Explanation", "explain"]

CHANNELS_SHOWN = 3
VALUES_SHOWN = 8
PLAIN = {
    "sync": False,
    "virtual_batch_size": None,
    "renorm": None,
    "channel_dim": 1,
    "frozen_statistics": False,
    "active_domain": None,
}


@dataclass(frozen=True, eq=False)
class Calculation:
    """The normalisation of a batch with one pair of statistics: the batch's own, or the running ones.

    Attributes
    ----------
    mean, var, sd : Tensor, shape (C,)
        mu, the biased variance (running: as stored) and its square root.
    z_hat : Tensor, shape (N, C, *)
        ``(z - mean) / sqrt(var + eps)``.
    y : Tensor, shape (N, C, *)
        ``gamma * z_hat + beta``.
    output : Tensor, shape (N, C, *)
        What the layer returns: ``g(y)`` where it has an activation g, else ``y``.
    """

    mean: Tensor
    var: Tensor
    sd: Tensor
    z_hat: Tensor
    y: Tensor
    output: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """What `explain` found; ``str()`` of it is a table.

    Attributes
    ----------
    layer : str
        The layer's own repr.
    z : Tensor, shape (N, C, *)
        The batch.
    count : int
        m, the values that each channel has in the batch.
    bound : float
        ``sqrt(m - 1)``: no z_hat of the training path is further from 0, whatever the batch holds.
    eps : float
        Added to the variance.
    gamma, beta : Tensor or None, shape (C,)
        None where the layer has none, which stands for 1 and 0.
    activation : str or None
        g, applied to y.
    training : Calculation
        With the batch's mean and biased variance.
    inference : Calculation or None
        With the running statistics; None where the layer has none, and uses the batch's in eval too.
    unbiased_var : Tensor, shape (C,)
        ``var * m / (m - 1)``.
    momentum : float or None
        Weight of the batch in the running statistics; for a cumulative mean one over the number of batches,
        this one included. None where nothing is updated.
    new_running_mean, new_running_var : Tensor or None, shape (C,)
        What the running statistics would be after a training step on this batch.
    running_var_kind : str
        The batch's variance that goes into the running one: "unbiased", or "biased" where the layer asks for that.
    """

    layer: str
    z: Tensor
    count: int
    bound: float
    eps: float
    gamma: Tensor | None
    beta: Tensor | None
    activation: str | None
    training: Calculation
    inference: Calculation | None
    unbiased_var: Tensor
    momentum: float | None
    new_running_mean: Tensor | None
    new_running_var: Tensor | None
    running_var_kind: str

    def __repr__(self) -> str:
        name = self.layer.partition("(")[0]
        return f"Explanation({name}, channels={self.z.shape[1]}, values per channel={self.count})"

    def __str__(self) -> str:
        channels = self.z.shape[1]
        lines = [*textwrap.wrap(self.layer, WIDTH, subsequent_indent="    "), *self._formulas()]
        for channel in range(min(channels, CHANNELS_SHOWN)):
            lines += ["", *self._channel(channel)]
        if channels > CHANNELS_SHOWN:
            lines += ["", f"... and {channels - CHANNELS_SHOWN} more channels"]
        return "\n".join(lines)

    def _formulas(self) -> list[str]:
        output = "" if self.activation is None else f",  g = {self.activation}"
        lines = [
            f"z_hat = (z - mean) / sqrt(var + eps),  y = gamma * z_hat + beta{output}",
            f"m = {self.count} values per channel, so |z_hat| <= sqrt(m - 1) = {self.bound:.5g} in training",
        ]
        if self.inference is None:
            lines.append("no running statistics: inference uses the batch's own too")
        elif self.momentum is None:
            lines.append("the running statistics are not updated")
        else:
            lines.append(
                f"new running = running + {self.momentum:.5g} * (batch, with {self.running_var_kind} var - running)"
            )
        return lines

    def _channel(self, channel: int) -> list[str]:
        gamma = "1, not learned" if self.gamma is None else f"{self.gamma[channel].item():.5g}"
        beta = "0, not learned" if self.beta is None else f"{self.beta[channel].item():.5g}"
        return [
            f"channel {channel}   gamma = {gamma}   beta = {beta}",
            *self._statistics(channel),
            "",
            *self._values(channel),
        ]

    def _statistics(self, channel: int) -> list[str]:
        batch = self.training
        rows: dict[str, list[Tensor | None]] = {"batch": [batch.mean, batch.var, batch.sd, self.unbiased_var]}
        if self.inference is not None:
            running = self.inference
            rows["running"] = [running.mean, running.var, running.sd, None]
        if self.momentum is not None and self.new_running_mean is not None and self.new_running_var is not None:
            rows["new running"] = [self.new_running_mean, self.new_running_var, self.new_running_var.sqrt(), None]
        columns = [
            format_column([None if values is None else values[channel].item() for values in column])
            for column in zip(*rows.values(), strict=True)
        ]
        return format_table(["", "mean", "var", "sd", "unbiased var"], [list(rows), *columns])

    def _values(self, channel: int) -> list[str]:
        def first(values: Tensor) -> list[str]:
            return format_column(values.select(1, channel).flatten()[:VALUES_SHOWN].tolist())

        shape = self.z.select(1, channel).shape
        shown = range(min(self.count, VALUES_SHOWN))
        places = [",".join(str(int(i)) for i in torch.unravel_index(torch.tensor(n), shape)) for n in shown]
        header = ["", ""]
        columns = [["row" if len(shape) == 1 else "index", *places], ["z", *first(self.z)]]
        for statistics, calculation in (("batch", self.training), ("running", self.inference)):
            if calculation is not None:
                header += [statistics, ""]
                columns += [["z_hat", *first(calculation.z_hat)], ["y", *first(calculation.y)]]
                if self.activation is not None:
                    header.append("")
                    columns.append(["g(y)", *first(calculation.output)])
        hidden = self.count - len(shown)
        return [*format_table(header, columns), *([f"  ... and {hidden} more values"] if hidden else [])]


def _checked(layer: nn.Module, x: Tensor) -> TorchBatchNorm:
    """The layer, once it is sure that it takes x."""
    if not isinstance(layer, TorchBatchNorm):
        raise InputError(f"layer must be a batch normalization layer, ours or torch's; got {type(layer).__name__}")
    if isinstance(layer, nn.SyncBatchNorm):
        raise InputError("layer must take its statistics from one process's batch; got SyncBatchNorm")
    if any(is_lazy(tensor) for tensor in [*layer.parameters(), *layer.buffers()]):
        raise InputError(f"layer must have seen a first batch, which sets its size; got {layer}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"x must be a tensor of a floating dtype; got {got}")
    try:
        layer._check_input_dim(x)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise InputError(f"x must have the dimensions that the layer takes; {error}") from error
    if x.dim() < 2 or x.shape[1] != layer.num_features:
        raise InputError(
            f"x must have the layer's {layer.num_features} channels in dimension 1; got shape {tuple(x.shape)}"
        )
    for option, plain in PLAIN.items():
        if getattr(layer, option, plain) != plain:
            raise InputError(
                f"explain shows the plain calculation, with {option}={plain}; got {getattr(layer, option)!r}"
            )
    if x.numel() < 2 * x.shape[1] or x.numel() == 0:
        raise InputError(f"x must have at least 2 values per channel; got shape {tuple(x.shape)}")
    return layer


def _momentum(layer: TorchBatchNorm, stepped: TorchBatchNorm) -> float | None:
    if layer.running_mean is None or not layer.track_running_stats:
        return None
    if layer.momentum is not None:
        return layer.momentum
    return 0.0 if stepped.num_batches_tracked is None else 1 / float(stepped.num_batches_tracked)


@torch.no_grad()
def explain(layer: nn.Module, x: Tensor) -> Explanation:
    """Calculate all that a batch normalization layer makes of a batch, in training and at inference.

    The layer is left exactly as it is: a copy of it gives the outputs and the new running statistics, the
    library's own reference and function what leads there. Formulas: Ioffe & Szegedy (2015), algorithms 1 and 2.

    Parameters
    ----------
    layer : Module
        Any of this library's or torch's batch normalization layers, in either mode.
    x : Tensor, shape (N, C, *)
        A batch, of a floating dtype. Hooks on the layer are not called.

    Returns
    -------
    Explanation
        Every number as a tensor; print it for a table.

    Raises
    ------
    InputError
        Not a batch normalization layer, or one that has no size yet or synchronises over processes; an x that
        the layer does not take; fewer than 2 values per channel.

    Examples
    --------
    >>> layer = nn.BatchNorm1d(1)
    >>> explanation = explain(layer, torch.tensor([[1.0], [3.0]]))
    >>> explanation.training.mean, explanation.training.var, explanation.new_running_mean
    (tensor([2.]), tensor([1.]), tensor([0.2000]))
    >>> print(explanation)  # doctest: +ELLIPSIS
    BatchNorm1d(1, eps=1e-05, ...
    z_hat = (z - mean) / sqrt(var + eps),  y = gamma * z_hat + beta
    m = 2 values per channel, so |z_hat| <= sqrt(m - 1) = 1 in training
    new running = running + 0.1 * (batch, with unbiased var - running)
    <BLANKLINE>
    channel 0   gamma = 1   beta = 0
                    mean   var       sd   unbiased var
      batch          2.0   1.0   1.0000              2
      running        0.0   1.0   1.0000
      new running    0.2   1.1   1.0488
    <BLANKLINE>
                   batch              running
      row   z      z_hat          y     z_hat   y
      0     1   -0.99999   -0.99999         1   1
      1     3    0.99999    0.99999         3   3
    """
    layer = _checked(layer, x)
    x = x.detach().clone()
    weight, bias = _kept(layer.weight), _kept(layer.bias)
    running_mean, running_var = _kept(layer.running_mean), _kept(layer.running_var)

    copied = copy.deepcopy(layer)
    # forward, not the call, so that no hook of the user's runs
    eval_output = copied.eval().forward(x)
    train_output = copied.train().forward(x)

    var = reference.moments(x).var.to(reference.widened(x).dtype)
    mean, unbiased_var = torch.zeros_like(var), torch.ones_like(var)
    # with momentum 1 these become the batch's mean and unbiased variance
    batch_norm(x, mean, unbiased_var, training=True, momentum=1.0)
    training = Calculation(
        mean=mean,
        var=var,
        sd=var.sqrt(),
        z_hat=batch_norm(x, None, None, training=True, eps=layer.eps),
        y=batch_norm(x, None, None, weight, bias, training=True, eps=layer.eps),
        output=train_output,
    )
    inference = None
    if running_mean is not None and running_var is not None:
        inference = Calculation(
            mean=running_mean,
            var=running_var,
            sd=running_var.sqrt(),
            z_hat=batch_norm(x, running_mean, running_var, eps=layer.eps),
            y=batch_norm(x, running_mean, running_var, weight, bias, eps=layer.eps),
            output=eval_output,
        )
    count = x.numel() // x.shape[1]
    return Explanation(
        layer=repr(layer),
        z=x,
        count=count,
        bound=math.sqrt(count - 1),
        eps=layer.eps,
        gamma=weight,
        beta=bias,
        activation=getattr(layer, "activation", None),
        training=training,
        inference=inference,
        unbiased_var=unbiased_var,
        momentum=_momentum(layer, copied),
        new_running_mean=copied.running_mean,
        new_running_var=copied.running_var,
        running_var_kind="unbiased" if getattr(layer, "unbiased", True) else "biased",
    )


def _kept(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
