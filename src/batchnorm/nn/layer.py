"""The forward of our layers, for any number of dimensions."""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]
from torch.nn import functional as F

from batchnorm import ops, torch_internals
from batchnorm.checks import Activation, check, check_dense
from batchnorm.errors import InputError, UnsupportedError
from batchnorm.kernels.plan import Plan
from batchnorm.kernels.records import Operands
from batchnorm.nn import contexts, exporting
from batchnorm.nn.buffers import context_of
from batchnorm.nn.contexts import PLAIN, LayerContext
from batchnorm.nn.layout import Batch, arrange, dimension_of_channels, refuse_channels, restore
from batchnorm.nn.options import Nonfinite, Options, SmallBatch, checked_numbers, checked_options
from batchnorm.nn.recognition import describe_lack
from batchnorm.nn.renorm import Renorm, RenormSchedule
from batchnorm.nn.running import channels_second
from batchnorm.nn.scripting import Scriptable
from batchnorm.nn.small_batch import label_of
from batchnorm.nn.step import Step, decide, decide_in_torch, normalize
from batchnorm.nn.step_state import Plans
from batchnorm.processes import has_processes
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["Layer", "layers_for", "layers_of", "overrides_forward", "stock_layers_of"]


SHAPES, PLANS_PER_SHAPE = 64, 4
"""Plan cache limits: input shapes per layer, and plans per shape. Further inputs are checked at each call."""


class Layer(Scriptable):
    """Mixin with our `forward`. It precedes torch's class of the same name in the MRO."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation | None = None,
        small_batch: SmallBatch = "raise",
        nonfinite: Nonfinite = "skip",
        virtual_batch_size: int | None = None,
        renorm: Renorm | RenormSchedule | None = None,
        sync: bool = False,
        process_group: Any = None,
        channel_dim: int = 1,
        unbiased: bool = True,
    ) -> None:
        options = Options(
            activation,
            small_batch,
            nonfinite,
            virtual_batch_size,
            renorm,
            sync,
            process_group,
            channel_dim,
            unbiased,
        )
        num_features, eps, momentum = checked_numbers(num_features, eps, momentum)
        options = checked_options(options, track_running_stats=track_running_stats)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)  # not passed on, since older torch has no such argument
        self.adopt(options, device)

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002 (torch's name for it)
        """Return ``activation(gamma * z_hat + beta + residual)``, of the shape and dtype of the input.

        The mask is bool, True where a value counts. Its sizes are those of the input without the channels, or 1.
        """
        # TorchScript compiles one branch of a condition that asks for it, but would compile what follows a return.
        if is_scripting():
            return self.in_torchscript(input, residual, mask)
        else:  # noqa: RET505
            return self._forward(input, residual, mask)

    def _forward(self, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:  # noqa: A002
        if not isinstance(input, Tensor):
            base = call_forward if overrides_forward(self) else None
            return exporting.traced(self, base, input, residual, mask)
        compiling, state = torch.compiler.is_compiling(), self.step_state
        # A planned call takes some ten microseconds, so nothing is asked of contexts while none is open.
        context = contexts.in_force(state.key, compiling) if compiling or contexts.OPEN else PLAIN
        reader = exporting.graph_reader(compiling)
        if reader is not None and not (reader == "torch.export" and self.trains()):  # see step.normalize
            if reader == "torch.jit.trace":
                exporting.refuse_context(context, reader, trains=self.trains())
            context = self._after_hooks(context, input, mask)
            return self._in_torch_operators(reader, Operands(input, *self.weight_and_bias(), residual, mask), context)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        plans = None
        if (
            mask is None
            and not compiling
            and torch_internals.count_dispatch_modes() == 0
            and type(input) is Tensor  # its sizes are numbers
            and torch_internals.graph_task_id() == -1
        ):
            plans = state.plans if context is PLAIN else state.plans_in(context)
            try:
                of_shape = plans.get(input.shape, ()) if plans is not None else ()
            except RuntimeError:  # a nested tensor has no shape
                check_dense(input)
                raise
            for plan in of_shape:
                y = self._run_plan(plan, input, residual, context)
                if y is not None:
                    return y
        if self._is_overridden(input, residual, mask):
            return self._overridden(input, residual, mask)
        context = self._after_hooks(context, input, mask)  # after an overridden input has come back unwrapped
        check_dense(input)
        dim = 1 if self.channel_dim == 1 else dimension_of_channels(input, self.channel_dim)
        (weight, bias), (mean, var, _) = self.weight_and_bias(), self.statistics_in(context)
        sized = next((each for each in (weight, bias, mean, var) if each is not None), None)
        if sized is not None and input.shape[dim] != sized.numel():  # as in torch, num_features is not asked
            label = "" if compiling else label_of(self)  # a graph sees no frames
            refuse_channels(input, dim, sized.numel(), self.num_features, label)
        batch = arrange(input, residual, mask, dim)
        of_domain = "" if context.domain is None else f"_{context.domain}"
        per_channel = {"weight": weight, "bias": bias, f"running_mean{of_domain}": mean, f"running_var{of_domain}": var}
        check(batch.x, batch.residual, batch.mask, **per_channel)
        operands = Operands(batch.x, weight, bias, batch.residual, batch.mask)
        return restore(self._normalize(operands, batch, plans if dim == 1 else None, context), batch, dim)

    def _after_hooks(self, context: LayerContext, x: Tensor, mask: Tensor | None) -> LayerContext:
        """Call the hooks of open contexts, and return the context with the statistics that the last of them gave."""
        for hook in context.hooks:
            found = hook(self, channels_second(self, x), mask)
            if found is not None:
                context = context._replace(adapted=found)
        return context

    def _run_plan(self, plan: Plan, x: Tensor, residual: Tensor | None, context: LayerContext) -> Tensor | None:
        """Return y by a plan; None if it was made for tensors of other dtypes, layouts and the like."""
        weight, bias = self.weight_and_bias()
        mean, var, batches = self.running_statistics(None) if context is PLAIN else self.statistics_in(context)
        statistics = (mean, var, batches, self._buffers["skipped_batches"])
        operands = Operands._make((x, weight, bias, residual, None))  # in half the time of Operands(...)
        y = ops.run_plan(plan, operands, statistics)
        if y is not None and plan.update_running and has_processes():
            self.count_samples(x.shape[0], context.domain)
        return y

    def _normalize(self, operands: Operands, batch: Batch, plans: Plans | None, context: LayerContext) -> Tensor:
        """Return y for a batch, and add a plan for later batches like it to the plans, where they are given."""
        step = decide(self, batch, context)
        if step.counts and has_processes():
            self.count_samples(batch.samples, context.domain)
        if plans is not None and step.can_plan:
            y = self._plan(plans, operands, step)
            if y is not None:
                return y
        return normalize(operands, step, self.step_state)

    def _plan(self, plans: Plans, operands: Operands, step: Step) -> Tensor | None:
        """Add a plan to the plans, and return y by it; None if there can be none."""
        x = operands.x
        of_shape = plans.get(x.shape, [])
        if len(plans) >= SHAPES or len(of_shape) >= PLANS_PER_SHAPE or not self.may_plan():
            return None
        plan = ops.make_plan(operands, step.running, step.rule)
        if plan is None:
            return None
        mean, var, batches, _, skipped, *_ = step.running
        y = ops.run_plan(plan, operands, (mean, var, batches, skipped))
        if y is not None:  # it is None where x is its own residual
            plans[x.shape] = [*of_shape, plan]
        return y

    def _in_torch_operators(self, reader: exporting.Reader, operands: Operands, context: LayerContext) -> Tensor:
        """Return y by torch's own operators, for tools that read them."""
        if self.trains():
            exporting.refuse_options(self.options(), reader)
        step = decide_in_torch(self, context)
        dim = dimension_of_channels(operands.x, self.channel_dim)
        return exporting.in_torch_operators(operands, step.running, step.rule, dim)

    def _is_overridden(self, *tensors: Tensor | None) -> bool:
        return ops.are_overridden(*tensors, *self.weight_and_bias())

    def _overridden(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return y as `batch_norm`, a function that the subclasses of Tensor among the arguments see."""
        tensors = (x, residual, mask, *self.weight_and_bias())
        by_torch = functools.partial(self._by_torch, x, residual, mask)
        y: Tensor = ops.call_overridden(batch_norm, tensors, (x, residual, mask, self), otherwise=by_torch)
        return y

    def _by_torch(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return y by torch's own forward, for a class of tensors that takes no function but torch's."""
        options = replace(self.options(), nonfinite="skip")
        if not (residual is None and mask is None and options == Options()) or self.trains() != self.training:
            raise UnsupportedError(
                f"{type(x).__name__} takes torch's batch norm and no other function, so the layer must have the "
                f"default options, and neither residual nor mask; got {options}"
            )
        if self.training and context_of(self).updates_paused:
            return F.batch_norm(x, None, None, *self.weight_and_bias(), training=True, eps=self.epsilon())
        return TorchBatchNorm.forward(self, x)

    def extra_repr(self) -> str:
        """Return torch's settings, then those of ours that differ from their defaults."""
        settings = {field.name: (getattr(self, field.name), field.default) for field in fields(Options)}
        settings |= {name: (getattr(self, name), False) for name in ("frozen_statistics", "frozen_affine")}
        settings["domains"] = (self.domain_names, [])
        ours = "".join(f", {name}={value!r}" for name, (value, default) in settings.items() if value != default)
        return super().extra_repr() + ours  # type: ignore[no-untyped-call, no-any-return]


def call_forward(layer: Layer, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002
    """Return what our `forward` does, without what a subclass adds to it; graphs of torch.fx name this function."""
    return Layer.forward(layer, input, residual, mask)


def batch_norm(x: Tensor, residual: Tensor | None, mask: Tensor | None, layer: Layer) -> Tensor:
    """Return the output of a layer, as a function of its input that subclasses of Tensor see."""
    return layer._forward(x, residual, mask)


def overrides_forward(layer: Layer) -> bool:
    """Return whether a subclass, or an assignment to the layer, gives it a forward other than ours."""
    return type(layer).forward is not Layer.forward or "forward" in vars(layer)


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Return the layers of ours in a model, by path; a layer that is used in several places appears once."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, Layer)}


def stock_layers_of(model: nn.Module) -> dict[str, TorchBatchNorm]:
    """Return torch's own layers in a model, by path."""
    layers = model.named_modules()
    return {path: layer for path, layer in layers if isinstance(layer, TorchBatchNorm) and not isinstance(layer, Layer)}


def layers_for(model: nn.Module, function: str, torchs: str, *, statistics: bool) -> dict[str, Layer]:
    """Return the layers of ours that a function acts on; with ``statistics`` those that keep running statistics.

    Parameters
    ----------
    model : Module
    function : str
        Its name, for messages.
    torchs : str
        The reason why the function cannot act on torch's layers: a verb phrase whose subject they are.
    statistics : bool

    Raises
    ------
    InputError
        The model has none, or has some of torch's, which the function would leave out silently.
    """
    stock = {p: layer for p, layer in stock_layers_of(model).items() if layer.track_running_stats or not statistics}
    ours = {p: layer for p, layer in layers_of(model).items() if layer.track_running_stats or not statistics}
    if stock:
        raise InputError(
            f"{function} needs batchnorm's layers, since torch's {torchs}; got {len(stock)} of torch's, the first at "
            f"{next(iter(stock)) or 'the model itself'}. Call batchnorm.convert(model) first"
        )
    if not ours:
        needed = " that keep running statistics" if statistics else ""
        raise InputError(f"{function} needs a model with batchnorm's layers{needed}; {describe_lack(model)}")
    return ours
