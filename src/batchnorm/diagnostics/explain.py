"""Every number that a batch normalization layer computes from one batch."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.diagnostics.explanation import Calculation, Explanation
from batchnorm.errors import InputError, InputTypeError, UnsupportedError
from batchnorm.functional import batch_norm
from batchnorm.kernels import reference
from batchnorm.nn.running import epsilon_of, keeps_unbiased_variance
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["Calculation", "Explanation", "explain"]

DEFAULTS = {
    "sync": False,
    "virtual_batch_size": None,
    "renorm": None,
    "channel_dim": 1,
    "frozen_statistics": False,
    "active_domain": None,
}
"""Options that change the calculation, with the values for which `explain` shows it."""


def _checked(layer: nn.Module, x: Tensor) -> TorchBatchNorm:
    """Return the layer if it is one that can be explained and takes x."""
    if not isinstance(layer, TorchBatchNorm):
        raise InputTypeError(f"layer must be a batch normalization layer, ours or torch's; got {type(layer).__name__}")
    if isinstance(layer, nn.SyncBatchNorm):
        raise UnsupportedError("explain takes layers with statistics of one process's batch; got SyncBatchNorm")
    if any(is_lazy(tensor) for tensor in [*layer.parameters(), *layer.buffers()]):
        raise InputError(f"layer must have seen a first batch, which sets its size; got {layer}")
    if not isinstance(x, Tensor):
        raise InputTypeError(f"x must be a tensor of a floating dtype; got {type(x).__name__}")
    if not x.is_floating_point():
        raise InputError(f"x must be a tensor of a floating dtype; got {x.dtype}")
    try:
        layer._check_input_dim(x)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise InputError(f"x must have the dimensions that the layer takes; {error}") from error
    sized = [tensor for tensor in (layer.weight, layer.bias, layer.running_mean) if tensor is not None]
    channels = sized[0].numel() if sized else layer.num_features
    if x.dim() < 2 or x.shape[1] != channels:
        raise InputError(f"x must have the layer's {channels} channels in dimension 1; got shape {tuple(x.shape)}")
    for option, default in DEFAULTS.items():
        if getattr(layer, option, default) != default:
            raise UnsupportedError(
                f"explain shows the calculation with {option}={default}; got {option}={getattr(layer, option)!r}"
            )
    if x.numel() < 2 * x.shape[1] or x.numel() == 0:
        raise InputError(f"x must have at least 2 values per channel; got shape {tuple(x.shape)}")
    return layer


def _momentum(layer: TorchBatchNorm, stepped: TorchBatchNorm) -> float | None:
    """Return the weight of the batch in the running statistics; ``stepped`` is the layer after the batch."""
    if layer.running_mean is None or not layer.track_running_stats:
        return None
    if layer.momentum is not None:
        return layer.momentum
    return 0.0 if stepped.num_batches_tracked is None else 1 / float(stepped.num_batches_tracked)


@torch.no_grad()
def explain(layer: nn.Module, x: Tensor) -> Explanation:
    """Compute every number of a batch normalization layer's calculation for one batch, in training and at inference.

    The layer is left unchanged: a copy of it gives the outputs and the new running statistics, and the library's
    reference the steps in between. Formulas: Ioffe & Szegedy (2015), algorithms 1 and 2.

    Parameters
    ----------
    layer : Module
        A batch normalization layer of this library or of torch, in either mode. Its hooks are not called.
    x : Tensor, shape (N, C, *)
        A batch, of a floating dtype.

    Returns
    -------
    Explanation
        Every number as a tensor; printing it shows tables.

    Raises
    ------
    InputTypeError
        The layer is not a batch normalization layer, or x is not a tensor.
    InputError
        The layer does not take x, or has not seen a first batch; x has fewer than 2 values per channel.
    UnsupportedError
        The layer has an option with another calculation: ``sync``, ``virtual_batch_size``, ``renorm``,
        ``channel_dim``, an active domain or frozen statistics.

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
    weight, bias = _copied(layer.weight), _copied(layer.bias)
    running_mean, running_var = _copied(layer.running_mean), _copied(layer.running_var)

    copied = copy.deepcopy(layer)
    # calling forward itself runs none of the user's hooks
    eval_output = copied.eval().forward(x)
    train_output = copied.train().forward(x)

    eps = epsilon_of(layer)
    var = reference.moments(x).var.to(reference.widened(x).dtype)
    mean, unbiased_var = torch.zeros_like(var), torch.ones_like(var)
    # with a momentum of 1 these become the mean and unbiased variance of the batch
    batch_norm(x, mean, unbiased_var, training=True, momentum=1.0)
    training = Calculation(
        mean=mean,
        var=var,
        sd=var.sqrt(),
        z_hat=batch_norm(x, None, None, training=True, eps=eps),
        y=batch_norm(x, None, None, weight, bias, training=True, eps=eps),
        output=train_output,
    )
    inference = None
    if running_mean is not None and running_var is not None:
        inference = Calculation(
            mean=running_mean,
            var=running_var,
            sd=running_var.sqrt(),
            z_hat=batch_norm(x, running_mean, running_var, eps=eps),
            y=batch_norm(x, running_mean, running_var, weight, bias, eps=eps),
            output=eval_output,
        )
    count = x.numel() // x.shape[1]
    return Explanation(
        layer=repr(layer),
        z=x,
        count=count,
        bound=math.sqrt(count - 1),
        eps=eps,
        gamma=weight,
        beta=bias,
        activation=getattr(layer, "activation", None),
        training=training,
        inference=inference,
        unbiased_var=unbiased_var,
        momentum=_momentum(layer, copied),
        new_running_mean=copied.running_mean,
        new_running_var=copied.running_var,
        unbiased=keeps_unbiased_variance(layer),
    )


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
