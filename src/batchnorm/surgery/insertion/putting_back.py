"""Layers put back into a folded model, in the places of those that were folded, under their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.nn import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.layer import Layer
from batchnorm.surgery.derived import underive
from batchnorm.surgery.folding.folded import Folded, inference_alone
from batchnorm.surgery.graph import Dataflow, Step
from batchnorm.surgery.insertion.observing import Batches, Observed, Observer
from batchnorm.surgery.insertion.preserving import undo_normalization
from batchnorm.surgery.insertion.step_kinds import HIDDEN_LAYERS
from batchnorm.surgery.norms.children import run_children
from batchnorm.surgery.norms.formula import activation_name
from batchnorm.surgery.opening import copied
from batchnorm.surgery.report import Left, Replacement

__all__ = ["PutBack"]

KINDS: dict[int, type[Layer]] = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
KEPT = ("eps", "momentum")
"""Settings of the layers that were folded, which their places still have."""


@dataclass
class Spot:
    """The place of a layer that was folded.

    Attributes
    ----------
    folded : Folded
    before : Module or None
        The linear layer or convolution whose output it takes, and nothing else does.
    observed : Observed
        What passes there.
    """

    folded: Folded
    before: nn.Module | None
    observed: Observed

    @property
    def channel_dim(self) -> int:
        """The dimension of the channels."""
        return -1 if isinstance(self.before, nn.Linear) and self.folded.dims != 2 else 1

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer before, which beta replaces."""
        return None if self.before is None else self.before._parameters.get("bias")

    def channels(self, path: str) -> int:
        """Return the number of channels; raise `InputError` if only an example could tell."""
        if "num_features" in vars(self.folded):
            return int(vars(self.folded)["num_features"])
        if self.observed.shape is None:
            raise InputError(f"an example must show the channels of the folded layer {path}; got None")
        return self.observed.shape[self.channel_dim]


class PutBack:
    """The plan of `insert` for a folded model.

    Attributes
    ----------
    left : tuple of Left
        The places where no layer comes back.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self.left: tuple[Left, ...] = ()
        self._spots = {
            path: Spot(module, _layer_before(flow, module), Observed())
            for path, module in flow.model.named_modules()
            if isinstance(module, Folded)
        }

    def find_layouts(self, batches: Batches | None, *, preserve: bool) -> None:
        """Observe what passes the places on an example."""
        if batches is None:
            return
        scratch = copied(self.flow.model, "insert")
        with ExitStack() as stack:
            for path, spot in self._spots.items():
                observer = Observer(spot.observed, _always(spot.channel_dim if preserve else None))
                hook = scratch.get_submodule(path).register_forward_pre_hook(_observing(observer))
                stack.callback(hook.remove)
            batches.run(scratch, all_batches=preserve)
        if preserve:
            unseen = [path for path, spot in self._spots.items() if spot.observed.shape is None]
            self.left = tuple(Left(path, "Folded", "the example does not reach it") for path in unseen)
            self._spots = {path: spot for path, spot in self._spots.items() if path not in unseen}

    def layers(self, options: Mapping[str, Any], *, preserve: bool) -> dict[str, Layer]:
        """Return the new layers, by path.

        Raises
        ------
        InputError
            The number of channels of a place needs an example; or what passes there is not finite, or is one value per
            channel.
        """
        made = {}
        for path, spot in self._spots.items():
            settings = {name: vars(spot.folded)[name] for name in KEPT if name in vars(spot.folded)} | dict(options)
            weight = next((spot.before or self.flow.model).parameters())
            kind = KINDS.get(spot.folded.dims, BatchNorm)
            layer = kind(spot.channels(path), device=weight.device, channel_dim=spot.channel_dim, **settings)
            children = dict(spot.folded.named_children())
            if [*children] == ["activation"]:
                layer.activation = activation_name(children["activation"])
            layer.to(weight.dtype).eval()
            if preserve and spot.observed.moments is not None:
                undo_normalization(layer, spot.observed.moments, spot.bias, path)
            made[path] = layer
        return made

    def apply(self, model: nn.Module, layers: Mapping[str, Layer]) -> None:
        """Turn the places in the model, or in a copy of it, into the new layers, and let it train again."""
        for path, layer in layers.items():
            place, before = model.get_submodule(path), self._spots[path].before
            children = {} if layer.activation is not None else dict(place.named_children())
            vars(place).clear()
            vars(place).update(vars(layer))
            object.__setattr__(place, "__class__", type(layer))  # whoever refers to the place calls the layer
            assert isinstance(place, Layer)
            for i, child in enumerate(children.values()):
                place.add_module(f"act{i or ''}", child)
            run_children(place, tuple(name for name, _ in place.named_children()))
            if before is not None:
                model.get_submodule(self.flow.path(before)).register_parameter("bias", None)
        for module in model.modules():
            if not any(isinstance(each, Folded) for each in module.modules()):
                underive(module, inference_alone)

    def replacements(self) -> tuple[Replacement, ...]:
        """Return the records of the report."""
        return tuple(
            Replacement(path, "Folded", KINDS.get(spot.folded.dims, BatchNorm).__name__)
            for path, spot in self._spots.items()
        )

    def notes(self) -> Iterator[str]:
        """Iterate over the sentences of the report."""
        yield "The model was folded: the layers came back where they had been, and nowhere else."
        if not self.left:
            yield "Its train() works again."


def _layer_before(flow: Dataflow, folded: Folded) -> nn.Module | None:
    if flow.why_no_single_call(folded):
        return None
    (call,) = flow.calls(folded)
    source = flow.source(call)
    module = flow.module(source) if isinstance(source, Step) else None
    if not isinstance(source, Step) or not isinstance(module, HIDDEN_LAYERS) or flow.why_no_single_call(module):
        return None
    uses = [use for use in flow.uses(source) if use != call]
    inside = flow.path(folded)  # where its activation is
    return module if all(isinstance(use, Step) and use.block == inside for use in uses) else None


def _always(dim: int | None) -> Any:
    def channel_dim(shape: torch.Size) -> int | None:
        return dim

    return channel_dim


def _observing(observer: Observer) -> Any:
    def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
        observer(given[0])

    return hook
