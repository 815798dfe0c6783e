"""The plan of `insert`: which new layer comes where, of which layout, and with which parameters and statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.nn import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.layer import Layer
from batchnorm.statistics.moments import Moments
from batchnorm.surgery.folding.exposure import Exposure
from batchnorm.surgery.graph import Dataflow, Step
from batchnorm.surgery.insertion.hidden import HiddenLayer, hidden_layers
from batchnorm.surgery.insertion.new_layers import Insertion, planned
from batchnorm.surgery.insertion.observing import Batches, Observed, Observer
from batchnorm.surgery.insertion.preserving import undo_normalization
from batchnorm.surgery.insertion.step_kinds import HIDDEN_LAYERS
from batchnorm.surgery.opening import copied
from batchnorm.surgery.report import Left, Replacement

__all__ = ["Placement", "Plan"]

Placement = Literal["before", "after"]

KINDS: dict[int, type[Layer]] = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}
FORWARDS = {kind.forward for kind in HIDDEN_LAYERS}


class Layout(NamedTuple):
    """The class of a new layer, its number of channels, and their dimension."""

    kind: type[Layer]
    channels: int
    dim: int


@dataclass
class Point:
    """A step whose output a new layer takes.

    Attributes
    ----------
    hidden : list of HiddenLayer
        The hidden layers whose nonlinearity it is; several, where their outputs are added before it.
    layout : Layout or None
    moments : Moments or None
        Of what passes there.
    """

    hidden: list[HiddenLayer] = field(default_factory=list)
    layout: Layout | None = None
    moments: Moments | None = None


class Plan:
    """Where new layers come, all decided before the model changes.

    Attributes
    ----------
    points : dict
        By the step whose output the new layer takes.
    """

    def __init__(self, flow: Dataflow, placement: Placement) -> None:
        self.flow, self.placement = flow, placement
        self.points: dict[Step, Point] = {}
        found, left = hidden_layers(flow)
        self._left = {layer.path: layer for layer in left}
        self._exposure = Exposure(flow)
        for layer in found:
            step = layer.call if placement == "before" else layer.end
            reason = self._exposure.why_all_read(layer.module) or (step if isinstance(step, str) else "")
            if isinstance(step, str) or reason:
                self._leave(layer, reason)
            else:
                self.points.setdefault(step, Point()).hidden.append(layer)
        self.insertion = self._insertion()

    @property
    def left(self) -> tuple[Left, ...]:
        """The layers that are left alone, in the order of the modules."""
        shared = {
            layer.path: Left(layer.path, type(layer.module).__name__, f"{place.path} normalizes its output too")
            for step, place in self.insertion.places.items()
            for layer in self.points[step].hidden[1:]
        }
        left = self._left | shared
        return tuple(left[path] for path, _ in self.flow.model.named_modules() if path in left)

    def find_layouts(self, batches: Batches | None, *, preserve: bool) -> None:
        """Find the layouts of the new layers, in the shapes that an example shows, and the moments to preserve."""
        observed = {} if batches is None else self._observed(batches, preserve=preserve)
        refused: dict[Step, str] = {}
        for step, point in self.points.items():
            seen = observed.get(step, Observed())
            layout = self._layout(point, seen.shape)
            if preserve and seen.shape is None:
                refused[step] = "the example does not reach it"
            elif isinstance(layout, str):
                refused[step] = layout
            else:
                point.layout, point.moments = layout, seen.moments
        self._refuse(refused)
        if refused:
            self.insertion = self._insertion()

    def layers(self, options: Mapping[str, Any], *, preserve: bool) -> dict[str, Layer]:
        """Return the new layers, by path.

        Raises
        ------
        InputError
            What passes a place is not finite, or is one value per channel.
        """
        made = {}
        for step, place in self.insertion.places.items():
            point = self.points[step]
            assert point.layout is not None
            near, weight = point.hidden[0].module, point.hidden[0].weight
            kind, channels, dim = point.layout
            layer = kind(channels, device=weight.device, channel_dim=dim, **options)
            layer.to(weight.dtype).train(near.training)
            if preserve:
                assert point.moments is not None
                undo_normalization(layer, point.moments, self._dropped_bias(point.hidden[0]), point.hidden[0].path)
            made[place.path] = layer
        return made

    def apply(self, model: nn.Module, layers: Mapping[str, Layer]) -> None:
        """Put the new layers into the model or a copy of it, and drop the biases that they replace."""
        self.insertion.put(model, layers)
        for layer in self._hidden():
            if self._dropped_bias(layer) is not None:
                model.get_submodule(layer.path).register_parameter("bias", None)

    def replacements(self) -> tuple[Replacement, ...]:
        """Return the records of the report."""
        found = {}
        for point in self.points.values():
            assert point.layout is not None
            norm = point.layout.kind.__name__
            for layer in point.hidden[:1]:
                name = type(layer.module).__name__
                after = [name, norm] if self.placement == "before" else [name, layer.activation, norm]
                found[layer.path] = Replacement(layer.path, ", ".join(a for a in after if a != norm), ", ".join(after))
        return tuple(found[path] for path, _ in self.flow.model.named_modules() if path in found)

    def notes(self) -> Iterator[str]:
        """Iterate over the sentences of the report."""
        places = list(self.insertion.places.values())
        if places:
            yield f"The new layers are named after those in front of them, as {places[0].path}."
        dropped = sum(self._dropped_bias(layer) is not None for layer in self._hidden())
        if dropped:
            yield f"{dropped} {'bias was' if dropped == 1 else 'biases were'} dropped, since beta takes the place."

    def _hidden(self) -> list[HiddenLayer]:
        return [layer for point in self.points.values() for layer in point.hidden]

    def _dropped_bias(self, layer: HiddenLayer) -> Tensor | None:
        """Return the bias of a hidden layer that the new layer behind it makes redundant; None if there is none."""
        module = layer.module
        if self.placement == "after" or type(module).forward not in FORWARDS or is_parametrized(module, "bias"):
            return None
        # A hook may change what the bias is part of, and other code may need it.
        return None if self._exposure.why_read(module) else module._parameters.get("bias")

    def _leave(self, layer: HiddenLayer, reason: str) -> None:
        self._left[layer.path] = Left(layer.path, type(layer.module).__name__, reason)

    def _refuse(self, reasons: Mapping[Step, str]) -> None:
        for step, reason in reasons.items():
            for layer in self.points.pop(step).hidden:
                self._leave(layer, reason)

    def _insertion(self) -> Insertion:
        """Return how layers come to all points, without those where they cannot."""
        while True:
            names = {step: f"{_name(self.flow, step, point)}_bn" for step, point in self.points.items()}
            insertion = planned(self.flow, names)
            if not insertion.refused:
                return insertion
            self._refuse(insertion.refused)

    def _observed(self, batches: Batches, *, preserve: bool) -> dict[Step, Observed]:
        """Run a copy of the model that has observers in the place of the new layers."""

        def observer(step: Step) -> Observer:
            def channel_dim(shape: torch.Size) -> int | None:
                layout = self._layout(self.points[step], shape) if preserve else ""
                return None if isinstance(layout, str) else layout.dim

            return Observer(observed[step], channel_dim)

        observed = {step: Observed() for step in self.points}
        scratch = copied(self.flow.model, "insert")
        self.insertion.put(scratch, {place.path: observer(step) for step, place in self.insertion.places.items()})
        batches.run(scratch, all_batches=preserve)
        return observed

    def _layout(self, point: Point, shape: torch.Size | None) -> Layout | str:
        """Return the layout of a new layer, given the shape that it takes, or the reason why there is none."""
        keeps = self.placement == "before" or all(layer.keeps_channels for layer in point.hidden)
        channels, dims = point.hidden[0].channels, point.hidden[0].dims
        if shape is None and not keeps:
            return "its output is reshaped before the nonlinearity, so that an example must show the channels"
        if shape is None:
            return Layout(KINDS[dims], channels, 1) if dims else Layout(BatchNorm1d, channels, -1)
        if len(shape) < 2 or (keeps and dims and len(shape) != dims + 2):
            return f"its output of shape {tuple(shape)} has no dimension of samples"
        if keeps or len(shape) == 2:
            return _layout_of(shape, 1 if dims else len(shape) - 1)
        fitting = [dim for dim, size in enumerate(shape) if size == channels and dim > 0]
        if not fitting and len(shape) == dims + 2:  # the channels were split or concatenated where they were
            fitting = [1]
        if len(fitting) != 1:
            return f"its output is reshaped to {tuple(shape)} before the nonlinearity, where channels are not found"
        return _layout_of(shape, fitting[0])


def _layout_of(shape: torch.Size, dim: int) -> Layout:
    if dim == 1 and len(shape) <= 5:
        return Layout(KINDS[max(len(shape) - 2, 1)], shape[1], 1)
    return Layout(BatchNorm1d if len(shape) == 3 else BatchNorm, shape[dim], -1 if dim == len(shape) - 1 else dim)


def _name(flow: Dataflow, step: Step, point: Point) -> str:
    """Return the name of a new layer in the block of the step: that of the hidden layer, from there."""
    path, block = point.hidden[0].path, step.block
    inside = path.startswith(f"{block}.") if block else True
    return path[len(block) :].strip(".").replace(".", "_") if inside else path.rpartition(".")[2]
