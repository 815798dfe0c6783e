"""Which batch normalization layers can be folded, and into which layer: decided before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.nn.buffers import context_of
from batchnorm.nn.layer import Layer
from batchnorm.surgery.folding import arithmetic
from batchnorm.surgery.folding.arithmetic import Fold, Foldable, Weights, is_foldable
from batchnorm.surgery.folding.exposure import why_further_arguments
from batchnorm.surgery.folding.neighbors import Neighbors
from batchnorm.surgery.graph import Dataflow, Step, Unknown
from batchnorm.surgery.graph.blocks import bound_arguments
from batchnorm.surgery.norms.formula import Norm, read_norm

__all__ = ["Dims", "Plan", "Planned", "plan_folds"]

Dims = Mapping[nn.Module, set[int]]
"""The numbers of dimensions of the inputs that batch norm layers had on an example; empty without one."""


@dataclass(frozen=True, eq=False)
class Planned:
    """A batch normalization layer that becomes part of another layer.

    Attributes
    ----------
    norm : Norm
    layer : Module
        A linear layer or a convolution.
    dims : int
        The number of dimensions that the input of the batch norm layer must have; 0 for any.
    copies : bool
        Its place must not return the input itself, which other code may change in place before the layer runs.
    """

    norm: Norm
    layer: Foldable
    dims: int
    copies: bool = False


@dataclass
class Plan:
    """The changes that fold a model.

    Attributes
    ----------
    folds : dict
        By the path of the batch norm layer.
    left : dict
        The reasons why the others are left alone, by path.
    weights : dict
        The weights that layers get.
    """

    folds: dict[str, Planned] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    weights: dict[Foldable, Weights] = field(default_factory=dict)


def plan_folds(flow: Dataflow, norms: Mapping[str, nn.Module], seen: Dims) -> Plan:
    """Return which of the batch norm layers can be folded.

    Parameters
    ----------
    flow : Dataflow
    norms : mapping
        The batch norm layers by path.
    seen : Dims
    """
    planner = _Planner(Neighbors(flow), seen)
    waiting = {path: norm for path, module in norms.items() if (norm := planner.read(path, module)) is not None}
    while True:  # a layer that was folded returns its input, which makes others neighbors
        before = len(waiting)
        waiting = {path: norm for path, norm in waiting.items() if not planner.fold(path, norm)}
        if len(waiting) == before:
            return planner.plan


class _Refused(Exception):  # noqa: N818 (it carries a reason within this file, and is no error of the user's)
    """A batch norm layer cannot be folded; the message is the reason, as a clause."""


class _Planner:
    def __init__(self, neighbors: Neighbors, seen: Dims) -> None:
        self.neighbors, self.seen = neighbors, seen
        self.plan = Plan()

    def read(self, path: str, module: nn.Module) -> Norm | None:
        """Return the formula of a batch norm layer; None, and the reason in the plan, if nothing can be folded."""
        norm = read_norm(module)
        reason = norm if isinstance(norm, str) else self.neighbors.why_exposed(module) or _why_not(norm)
        if isinstance(norm, str) or reason:
            self.plan.left[path] = reason
            return None
        return norm

    def fold(self, path: str, norm: Norm) -> bool:
        """Return whether a layer can be folded, and put that into the plan, or the reason why not."""
        reasons = []
        for way in (self._into_the_layer_before, self._into_the_next_layer):
            try:
                planned, weights = way(norm)
            except _Refused as refused:
                reasons.append(str(refused))
            else:
                self.plan.folds[path], self.plan.weights[planned.layer] = planned, weights
                self.plan.left.pop(path, None)
                if norm.activation is None and not self._residuals(norm):
                    self.neighbors.gone.add(norm.module)
                return True
        self.plan.left[path] = ", and ".join(dict.fromkeys(reasons))
        return False

    # The two ways.

    def _into_the_layer_before(self, norm: Norm) -> tuple[Planned, Weights]:
        neighbors, calls = self.neighbors, self._calls(norm.module)
        sources = [neighbors.source_of_rows(call) for call in calls]
        layer = self._layer(sources, "its input comes from")
        if any(neighbors.source(call, 1) in sources for call in self._residuals(norm)):
            raise _Refused("it adds its own input as residual")
        uses_of = neighbors.uses_of_rows if isinstance(layer, nn.Linear) else neighbors.uses
        for step in self._calls(layer):
            uses = list(uses_of(step))
            for use in uses:
                if isinstance(use, Unknown):
                    raise _Refused(f"the output of {type(layer).__name__} may be used elsewhere: {use.reason}")
            if len(uses) != 1 or uses[0] not in calls:
                others = neighbors.described([use for use in uses if use not in calls])
                raise _Refused(f"the output of {type(layer).__name__} also goes to {others}")
        out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        return Planned(norm, layer, self._dims(norm, layer, out)), self._weights(norm, layer, arithmetic.then)

    def _into_the_next_layer(self, norm: Norm) -> tuple[Planned, Weights]:
        if norm.activation is not None:
            raise _Refused(f"{type(norm.activation).__name__} comes next")
        if self._residuals(norm):
            raise _Refused("it adds a residual")
        neighbors, calls = self.neighbors, self._calls(norm.module)
        targets: list[Step | Unknown] = []
        for call in calls:
            uses = list(neighbors.uses(call))
            if len(uses) != 1:
                raise _Refused(f"its output goes to {neighbors.described(uses)}")
            targets += uses
        layer = self._layer(targets, "its output goes to")
        if any(step not in targets or neighbors.source(step) not in calls for step in self._calls(layer)):
            raise _Refused(f"its output goes to {type(layer).__name__}, which also takes other inputs")
        reason = arithmetic.pads_otherwise(layer, arithmetic.affine_of(norm).shift)
        if reason:
            raise _Refused(f"its output goes to {reason}")
        into = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        copies = any(neighbors.input_may_change(call, calls) for call in calls)
        planned = Planned(norm, layer, self._dims(norm, layer, into), copies)
        return planned, self._weights(norm, layer, arithmetic.with_input)

    # Parts of both.

    def _layer(self, steps: Sequence[Step | Unknown], where: str) -> Foldable:
        """Return the one layer that all steps call, if something can be folded into it."""
        for step in steps:
            if isinstance(step, Unknown):
                raise _Refused(step.reason.replace("it is the input", "its input is the input"))
        layers = [self.neighbors.flow.module(step) for step in steps if isinstance(step, Step)]
        layer = layers[0]
        if not is_foldable(layer) or not all(map(is_foldable, layers)):
            raise _Refused(f"{where} {self.neighbors.described(steps)}")
        if any(other is not layer for other in layers):
            raise _Refused(f"it is called {len(steps)} times, beside different layers")
        reason = arithmetic.why_not(layer) or self.neighbors.why_exposed(layer)
        reason = reason or why_further_arguments(self.neighbors.flow, layer)
        if reason:
            raise _Refused(reason)
        if self.neighbors.is_tied(layer):
            raise _Refused(f"the weights of {type(layer).__name__} are tied to those of another module")
        return layer

    def _calls(self, module: nn.Module) -> list[Step]:
        calls = self.neighbors.flow.calls(module)
        if not calls:
            raise _Refused(self.neighbors.flow.why_no_single_call(module))
        return calls

    def _residuals(self, norm: Norm) -> list[Step]:
        """Return the calls of a batch norm layer with a residual."""
        return [call for call in self._calls(norm.module) if self._arguments(norm, call).get("residual") is not None]

    def _arguments(self, norm: Norm, call: Step) -> Mapping[str, Any]:
        try:
            arguments = bound_arguments(norm.module, call.node)
        except TypeError:
            raise _Refused("it is called in a way that its forward does not declare") from None
        if arguments.get("mask") is not None:
            raise _Refused("it is called with a mask")
        if call.node.kwargs.keys() - {"input", "residual", "mask"}:
            raise _Refused(f"it is called with {', '.join(call.node.kwargs)} by name")
        return arguments

    def _dims(self, norm: Norm, layer: Foldable, channels: int) -> int:
        """Return the number of dimensions for which both take the same dimension for channels; 0 for any."""
        kind, linear = type(layer).__name__, isinstance(layer, nn.Linear)
        if channels != norm.num_features:
            raise _Refused(f"it normalizes {norm.num_features} channels, where {kind} has {channels}")
        channel_dim = getattr(norm.module, "channel_dim", 1)
        if linear and channel_dim == -1:
            return 0
        if channel_dim != 1:
            raise _Refused(f"its channels are in dimension {channel_dim}, and those of {kind} are not")
        spatial = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
        if norm.dims not in (None, spatial or 1):
            raise _Refused(f"it takes inputs of other numbers of dimensions than {kind}")
        if self.seen.get(norm.module, {spatial + 2}) != {spatial + 2}:
            shape = "(N, C, L)" if linear else "another shape"
            raise _Refused(f"it normalizes dimension 1 of {shape}, where the channels of {kind} are not")
        return spatial + 2

    def _weights(self, norm: Norm, layer: Foldable, fold: Fold) -> Weights:
        affine = arithmetic.affine_of(norm)
        weights = fold(layer, self.plan.weights.get(layer) or arithmetic.weights_of(layer), affine)
        reason = arithmetic.misfit(layer, affine, fold) or arithmetic.misfit_of_values(layer, weights)
        if reason:
            raise _Refused(reason)
        return weights


def _why_not(norm: Norm) -> str:
    """Return why a batch norm layer can be folded nowhere; empty if it depends on its neighbors."""
    if is_parametrized(norm.module):
        return "its weight or bias is parametrized"
    if not norm.uses_running_statistics_in_eval:
        return "it keeps no running statistics, so that its scale and shift depend on the batch"
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if any(values is not None and values.is_meta for values in tensors):
        return "it is on the meta device, where it has no values"
    if isinstance(norm.module, Layer) and context_of(norm.module).hooks:
        return "it is adapted to each batch by itself"
    finite = all(bool(values.isfinite().all()) for values in arithmetic.affine_of(norm))
    return "" if finite else "its scale or shift is not finite"
