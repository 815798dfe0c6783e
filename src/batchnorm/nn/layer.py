"""The forward of our layers, whatever the number of dimensions."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm
from torch.utils._python_dispatch import _disable_current_modes

from batchnorm import ops
from batchnorm.checks import Activation, check
from batchnorm.kernels.plan import Plan
from batchnorm.kernels.records import Operands, Rule, Running
from batchnorm.nn import accumulated, exporting, sync
from batchnorm.nn.accumulated import Pool
from batchnorm.nn.layout import dimension_of_channels, refuse_channels
from batchnorm.nn.options import Nonfinite, Options, SmallBatch, checked_numbers, checked_options
from batchnorm.nn.renorm import Renorm, RenormSchedule
from batchnorm.nn.small_batch import label_of, refuse_single_value, warn_of_one_sample
from batchnorm.nn.state import State
from batchnorm.nn.sync import Spread
from batchnorm.processes import group_of, has_processes

__all__ = ["Layer", "layers_of", "stock_layers_of"]


SHAPES, FORMS = 64, 4
"""Of how many shapes a layer keeps plans, and how many of each; other inputs are looked at each time."""


class Layer(State):
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
        self._take(options, device)

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002 (torch's name for it)
        """Return ``activation(gamma * z_hat + beta + residual)``, of input's shape and dtype.

        mask is bool, of input's shape without the channels, each size equal or 1; True where a value counts.
        """
        if not isinstance(input, Tensor):
            return exporting.traced(self, input, residual, mask)
        if exporting.portable(self):
            return exporting.in_torchs_operators(self, input, residual, mask)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        plans = None
        if (
            mask is None
            and ops.no_modes()
            and type(input) is Tensor  # its sizes are numbers
            and torch._C._current_graph_task_id() == -1
        ):
            plans = self._plans
            for plan in plans.get(input.shape, ()):
                y = self._again(plan, input, residual)
                if y is not None:
                    return y
        dim = 1 if self.channel_dim == 1 else dimension_of_channels(input, self.channel_dim)
        if input.shape[dim] != self.num_features:
            label = "" if torch.compiler.is_compiling() else label_of(self)  # a graph sees no frames
            refuse_channels(input, dim, self.num_features, label)
        if dim == 1:
            return self._normalised(input, residual, mask, input.shape[0], input.shape, plans)
        if residual is not None:
            check(input, residual, None)
        samples = input.shape[1 if dim == 0 else 0]
        if dim == input.dim() - 1 and input.is_contiguous():  # rows of channels, as they are
            features = self.num_features
            flat = None if residual is None else residual.reshape(-1, features)
            if mask is not None:
                check(input.movedim(dim, 1), None, mask)
                mask = mask.expand(input.shape[:-1]).reshape(-1)
            return self._normalised(input.view(-1, features), flat, mask, samples, input.shape).view(input.shape)
        moved = None if residual is None else residual.movedim(dim, 1)
        return self._normalised(input.movedim(dim, 1), moved, mask, samples, input.shape).movedim(1, dim)

    def _again(self, plan: Plan, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """As forward, by a plan; None where the tensors are others than it was made for."""
        statistics = (*self.running_statistics(self.active_domain), self._buffers["skipped_batches"])
        y = ops.run_plan(plan, x, residual, self.weight_and_bias(), statistics)
        if y is not None and plan.update and has_processes():
            self.count_samples(x.shape[0])
        return y

    def _normalised(
        self,
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        samples: int,
        shape: torch.Size,
        plans: dict[torch.Size, list[Plan]] | None = None,
    ) -> Tensor:
        """Normalise x (N, C, *), or the rows (N * L, C) of so many samples; shape is the input's, to speak of.

        Where ``plans`` are given, one for further inputs like x is put there.
        """
        check(x, residual, mask)
        weight, bias = self.weight_and_bias()
        mean, var, batches = self.running_statistics(self.active_domain)
        compiling = torch.compiler.is_compiling()
        learning = self.training and not self.frozen_statistics
        own = learning or (mean is None and var is None)  # whether the batch's statistics are used
        group = group_of(self.process_group) if self.sync and learning else None
        spread = None if group is None else sync.spread(self, x, mask, group)
        if own and (x.numel() == self.num_features > 0 if spread is None else spread.single):
            if not (learning and self.small_batch == "running"):
                refuse_single_value(self, shape)
            learning = own = False
            spread = None
        if learning and not compiling and samples == 1 and spread is None and not self._warned_of_one_sample:
            self._warned_of_one_sample = True
            warn_of_one_sample(self, shape)
        # Activation checkpointing runs forward again within the backward; compiled it counts once by itself.
        again = not compiling and torch._C._current_graph_task_id() != -1
        counts = learning and self.track_running_stats and not again and not self._held
        if counts and has_processes():
            self.count_samples(samples)
        pool = self._pool if counts else None
        moving = counts and pool is None
        operands = Operands(x, weight, bias, residual, mask)
        rule, skipped = Rule(self.eps, self.activation, own), self._buffers["skipped_batches"]
        running = Running(mean, var, batches, self.momentum, skipped, self.unbiased, moving)
        if learning and self.virtual_batch_size is not None:
            rule = _virtual(rule, x, samples, self.virtual_batch_size)
        if not learning or (self.renorm is None and pool is None and spread is None):
            if plans is not None and not (self.sync and learning):  # under sync processes may come later
                y = self._by_new_plan(plans, operands, running, rule)
                if y is not None:
                    return y
            return ops.batch_norm(operands, running, rule)
        return self._with_options(operands, running, rule, again, spread, pool)

    def _by_new_plan(
        self,
        plans: dict[torch.Size, list[Plan]],
        operands: Operands,
        running: Running,
        rule: Rule,
    ) -> Tensor | None:
        """As forward, by a plan that is put among the others; None where there can be none."""
        x, weight, bias, residual, _ = operands
        found = plans.get(x.shape, [])
        if len(plans) >= SHAPES or len(found) >= FORMS or not self.may_plan():
            return None
        plan = ops.make_plan(operands, running, rule)
        if plan is None:
            return None
        statistics = (running.mean, running.var, running.batches, running.skipped)
        y = ops.run_plan(plan, x, residual, (weight, bias), statistics)
        if y is not None:  # it is None where x is its own residual
            plans[x.shape] = [*found, plan]
        return y

    def _with_options(
        self,
        operands: Operands,
        running: Running,
        rule: Rule,
        again: bool,
        spread: Spread | None,
        pool: Pool | None,
    ) -> Tensor:
        """Train over processes, with batch renormalization, or while several batches are pooled."""
        keeps = False
        if self.renorm is not None:
            assert running.batches is not None
            rule = rule._replace(limits=self.renorm.limits(running.batches))
            if again:
                with _disable_current_modes():  # selective checkpoints know the operators of the first run alone
                    seen = ops.moments(operands.x, operands.mask) if spread is None else spread.moments
                    rule = rule._replace(correction=self._first_runs.find(seen))
            else:
                keeps = _may_run_again()
        if spread is None:
            found = ops.normalize(operands, running, rule, moments=keeps or pool is not None)
        else:
            found = sync.normalise(operands, running, rule, spread)
        y, batch, correction = found
        if batch is not None and keeps:
            assert correction is not None
            self._first_runs.keep(batch, correction)
        if batch is not None and pool is not None:
            accumulated.add(pool, self.active_domain, batch, running)
        return y

    def extra_repr(self) -> str:
        """Torch's settings, then those of ours that differ from its behaviour."""
        settings = {field.name: (getattr(self, field.name), field.default) for field in fields(Options)}
        settings |= {name: (getattr(self, name), False) for name in ("frozen_statistics", "frozen_affine")}
        settings["domains"] = (self.domain_names, [])
        said = "".join(f", {name}={value!r}" for name, (value, default) in settings.items() if value != default)
        return super().extra_repr() + said  # type: ignore[no-untyped-call, no-any-return]

    def __prepare_scriptable__(self) -> nn.Module:
        return exporting.scriptable(self)


def _virtual(rule: Rule, x: Tensor, samples: int, size: int) -> Rule:
    """The rule for chunks of so many samples; a last one with a single value a channel joins the one before it."""
    if samples <= size:
        return rule
    rows = x.shape[0] // samples
    chunks, left = -(-samples // size), samples % size
    if left * (x.numel() // (samples * x.shape[1])) == 1:
        chunks -= 1
    return rule if chunks == 1 else rule._replace(chunks=chunks, chunk=size * rows)


def _may_run_again() -> bool:
    """Whether this forward may be run again: under activation checkpointing, reentrant or not."""
    return not torch.compiler.is_compiling() and (
        not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """The layers of ours in a model, by path; a layer used in several places once."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, Layer)}


def stock_layers_of(model: nn.Module) -> dict[str, TorchBatchNorm]:
    """Torch's own layers in a model, by path."""
    layers = model.named_modules()
    return {path: layer for path, layer in layers if isinstance(layer, TorchBatchNorm) and not isinstance(layer, Layer)}
