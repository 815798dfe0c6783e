"""Layers in TorchScript: the branch of `forward` that ``torch.jit.script`` compiles, in torch's own operators."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.errors import InputError, UnsupportedError
from batchnorm.nn.buffers import context_of
from batchnorm.nn.exporting import STOCK, refusal, refuse_context, refuse_options
from batchnorm.nn.reading import Readable
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["Scriptable"]


class Scriptable(Readable):
    """A layer that TorchScript compiles where it stands; the model that is scripted keeps its layers."""

    # TorchScript reads the annotations of the first class that has any, as types: hence no postponed annotations here.
    script_refusal: str

    __constants__ = [*TorchBatchNorm.__constants__, "script_updates"]  # noqa: RUF012 (a list in torch)
    __jit_unused_properties__ = ("active_domain", "domain_names", "eps", "__jit_ignored_attributes__")

    @property
    def __jit_ignored_attributes__(self) -> list[str]:
        """The buffers that a script does not get, since it would save them."""
        return self.buffers_torch_lacks()

    def __prepare_scriptable__(self) -> nn.Module:
        """Check that TorchScript can compile the layer, and set the attributes that it alone reads.

        Raises
        ------
        InputError
            The layer has an option that torch's layers do not have, and that matters in its mode.
        UnsupportedError
            A hook has no name, as those of pruning, or a subclass calls super(), which TorchScript does not have. Or
            the layer is within `accumulate`, or adapted to each batch.
        """
        options = self.options()
        if options.channel_dim != STOCK.channel_dim:
            raise InputError(
                "TorchScript takes torch's layers, which do not have the option channel_dim; got "
                f"channel_dim={options.channel_dim}"
            )
        if self.trains():
            refuse_options(options, "TorchScript")
        if "super" in type(self).forward.__code__.co_names:
            raise UnsupportedError(
                f"TorchScript has no super(), which the forward of {type(self).__name__} calls; hold the layer as a "
                "module of its own and call that"
            )
        for hook in (*self._forward_pre_hooks.values(), *self._forward_hooks.values()):
            if not hasattr(hook, "__name__"):
                raise UnsupportedError(
                    f"TorchScript compiles hooks, which must be functions; got {type(hook).__name__}. Pruning ends "
                    "with torch.nn.utils.prune.remove(layer, 'weight')"
                )
        context = context_of(self)
        refuse_context(context, "TorchScript", trains=self.trains())
        self.__dict__["script_updates"] = not context.updates_paused
        self.__dict__["script_refusal"] = refusal(options, "TorchScript")
        return self

    def in_torchscript(self, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:  # noqa: A002
        """Compute a forward; only TorchScript runs this, in which options are constants of the script."""
        trains = self.training and not self.frozen_statistics
        if trains and len(self.script_refusal) > 0:
            raise RuntimeError(self.script_refusal)
        factor = 0.0
        if self.momentum is not None:
            factor = self.momentum
        if self.script_updates and trains and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        mean, var = self.running_mean, self.running_var
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if trains and not self.track_running_stats:
            mean, var = None, None
        if not self.script_updates and trains and mean is not None and var is not None:
            mean, var = mean.clone(), var.clone()  # for torch's operator to update
        batch_statistics = trains or mean is None
        if batch_statistics and mask is not None:
            raise RuntimeError("mask must be None in a script that uses batch statistics; got a mask")
        if mean is not None:  # in float32 where the parameters are narrower; the optimizer drops a cast of constants
            weight = None if weight is None else weight.to(mean.dtype)
            bias = None if bias is None else bias.to(mean.dtype)
        y = F.batch_norm(input, mean, var, weight, bias, batch_statistics, factor, self.eps)
        if residual is not None:
            y = y + residual
        y = activated(y, self.activation)
        if mask is not None:
            y = torch.where(mask.unsqueeze(1), y, torch.zeros_like(y))
        return y


def activated(y: Tensor, activation: str | None) -> Tensor:
    """Apply an activation; TorchScript compiles this function."""
    if activation is None:
        return y
    if activation == "relu":
        y = torch.relu(y)
    elif activation == "leaky_relu":
        y = F.leaky_relu(y, 0.01)
    elif activation == "silu":
        y = F.silu(y)
    elif activation == "gelu":
        y = F.gelu(y)
    elif activation == "tanh":
        y = torch.tanh(y)
    elif activation == "sigmoid":
        y = torch.sigmoid(y)
    return y
