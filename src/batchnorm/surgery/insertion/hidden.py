"""The hidden layers of a network: those whose output reaches a nonlinearity, and why the others are none.

A layer's output is followed through pooling, dropout, reshapes and additions to the first steps that decide. What the
nonlinearity feeds tells hidden layers from output layers and gates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from batchnorm.surgery.graph import Dataflow, Step, Unknown
from batchnorm.surgery.insertion.formulas import combines_others, end_of_formula, is_gate
from batchnorm.surgery.insertion.step_kinds import (
    HIDDEN_LAYERS,
    Kind,
    is_in_place,
    keeps_channels,
    kind_of,
    name_of,
    operands,
)
from batchnorm.surgery.norms.formula import is_batch_norm
from batchnorm.surgery.report import Left

__all__ = ["HiddenLayer", "hidden_layers"]

FOLLOWED = {Kind.PASSES, Kind.ADDS, Kind.MULTIPLIES, Kind.ARITHMETIC}


@dataclass(frozen=True, eq=False)
class HiddenLayer:
    """A layer whose output reaches a nonlinearity.

    Attributes
    ----------
    path : str
    module : Module
    call : Step
        The only call of the layer.
    activation : str
        The nonlinearity, as a report names it.
    end : Step or str
        The last step of the nonlinearity, or the reason why a layer cannot be put behind it, a clause.
    keeps_channels : bool
        Whether the channels of that step are known to be those of the layer, in the same dimension.
    feeds : frozenset of Module
        The layers that the nonlinearity feeds.
    """

    path: str
    module: nn.Module
    call: Step
    activation: str
    end: Step | str
    keeps_channels: bool
    feeds: frozenset[nn.Module]

    @property
    def weight(self) -> Tensor:
        """The weight of the layer, computed where it is parametrized."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight

    @property
    def channels(self) -> int:
        """The number of its output channels."""
        name = "out_features" if isinstance(self.module, nn.Linear) else "out_channels"
        channels: int = getattr(self.module, name)
        return channels

    @property
    def dims(self) -> int:
        """The dimensions that a convolution runs over; 0 for a linear layer."""
        return 0 if isinstance(self.module, nn.Linear) else self.weight.dim() - 2


class NotHidden(Exception):  # noqa: N818 (it carries a reason within this file, and is no error of the user's)
    """A layer is left alone; the message is the reason, as a clause."""


class Gate(NotHidden):
    """A layer is left alone because it is a gate."""


def hidden_layers(flow: Dataflow) -> tuple[list[HiddenLayer], list[Left]]:
    """Return the hidden layers of a model that nothing normalizes, and all other layers with the reasons."""
    found: list[HiddenLayer] = []
    left: dict[str, Left] = {}
    gates: set[nn.Module] = set()
    whole = None  # the path of a module that runs as one step
    for path, module in flow.model.named_modules():
        reason = None if whole is not None and path.startswith(whole) else _why_never_hidden(module)
        if reason is None:
            continue
        if reason:
            whole = f"{path}."
            left[path] = Left(path, type(module).__name__, reason)
            continue
        try:
            found.append(_hidden_layer(flow, path, module))
        except NotHidden as error:
            left[path] = Left(path, type(module).__name__, str(error))
            gates |= {module} if isinstance(error, Gate) else set()
    # The layers before a gate belong to it, as the first one of squeeze-and-excitation.
    while inner := [layer for layer in found if layer.feeds <= gates]:
        gates.update(layer.module for layer in inner)
        reason = "it feeds a gate and nothing else"
        left |= {layer.path: Left(layer.path, type(layer.module).__name__, reason) for layer in inner}
        found = [layer for layer in found if layer not in inner]
    return found, [left[path] for path, _ in flow.model.named_modules() if path in left]


def _why_never_hidden(module: nn.Module) -> str | None:
    """Return why a layer is never hidden, "" for one that may be, and None for a module that is no layer."""
    name, children = type(module).__name__, list(module.children())
    if isinstance(module, HIDDEN_LAYERS):
        inside = [type(child).__name__ for child in children if is_batch_norm(child)]
        return f"it has {inside[0]} inside" if inside else ""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "the steps of a recurrent layer share its weights"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "an embedding is a table, whose rows feed no nonlinearity"
    if isinstance(module, nn.MultiheadAttention):
        return "the projections of attention feed no nonlinearity"
    if name.startswith("Transformer") and type(module).__module__.startswith("torch.nn."):
        return f"torch runs {name} as a whole, with nothing between its layers"
    if not children and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
        return f"{name} is no Linear or convolution of torch"
    return None


def _hidden_layer(flow: Dataflow, path: str, module: nn.Module) -> HiddenLayer:
    """Return a layer as a hidden one.

    Raises
    ------
    NotHidden
        It is none, or that cannot be known.
    """
    reason = "it is the model itself" if module is flow.model else flow.why_no_single_call(module)
    if reason:
        raise NotHidden(reason)
    (call,) = flow.calls(module)
    ends, moved = _first_ends(flow, call)
    _refuse(flow, ends)
    if any(_is_attention(flow, step) for step in _sources(flow, [call], {Kind.PASSES})):
        raise NotHidden("an attention projection")
    nonlinearities = [end for end in ends if kind_of(flow, end) is Kind.NONLINEARITY]
    if not nonlinearities:
        raise NotHidden(_without_nonlinearity(flow, ends))
    feeds: set[nn.Module] = set()
    for step in nonlinearities:
        given = operands(flow, step)[0]
        if is_in_place(flow, step) and (isinstance(given, Unknown) or len(flow.uses(given)) > 1):
            raise NotHidden(f"{name_of(flow, step)} changes a value in place that others use")
        feeds |= _fed_by(flow, step)
    names = ", ".join(dict.fromkeys(name_of(flow, step) for step in nonlinearities))
    end = _single_end(flow, nonlinearities)
    keeps = isinstance(end, str) or not moved.intersection(nonlinearities)
    return HiddenLayer(path, module, call, names, end, keeps, frozenset(feeds))


def _first_ends(flow: Dataflow, start: Step) -> tuple[list[Step], set[Step]]:
    """Return the first steps that decide, behind as few sums with other tensors as possible.

    Also returned are the steps before which the channels change their number or dimension.
    """
    seen, level, moved = {start}, [start], set[Step]()
    while level:
        ends: list[Step] = []
        sums: list[Step] = []
        waiting = deque(level)
        while waiting:
            value = waiting.popleft()
            for use in flow.uses(value):
                if isinstance(use, Unknown):
                    raise NotHidden(use.reason)
                if value in moved or (value != start and not keeps_channels(flow, value)):
                    moved.add(use)
                if use in seen:
                    continue
                seen.add(use)
                kind = kind_of(flow, use)
                if kind is Kind.ADDS and combines_others(flow, use):
                    sums.append(use)
                elif kind in FOLLOWED:
                    waiting.append(use)
                else:
                    ends.append(use)
        if ends:
            return ends, moved
        level = sums
    return [], moved


def _refuse(flow: Dataflow, ends: Iterable[Step]) -> None:
    """Raise `NotHidden` if one of the steps that decide is none that may follow a hidden layer."""
    for end in ends:
        kind, name = kind_of(flow, end), name_of(flow, end)
        if kind is Kind.PRODUCT and _is_attention(flow, end):
            raise NotHidden("an attention projection")
        if kind is Kind.PRODUCT:
            raise NotHidden(f"{name} multiplies its output with another tensor")
        if kind is Kind.SOFTMAX:
            ends_there = all(kind_of(flow, use) is Kind.OUTPUT for use in _reached(flow, [end], FOLLOWED))
            raise NotHidden(f"an output layer, with {name} behind it" if ends_there else f"{name} takes its output")
        if kind is Kind.NORMALIZES:
            raise NotHidden(f"{name} normalizes its output")
        if kind is Kind.GATE:
            raise Gate(f"a gate: {name} multiplies one half of its output with the other")
        if kind is Kind.OTHER:
            raise NotHidden(f"{name} takes its output, and is not known as a nonlinearity")


def _without_nonlinearity(flow: Dataflow, ends: Collection[Step]) -> str:
    if not ends:
        return "nothing takes its output"
    if all(kind_of(flow, end) is Kind.OUTPUT for end in ends):
        return "an output layer"
    return "no nonlinearity stands between it and the next layer"


def _is_attention(flow: Dataflow, step: Step) -> bool:
    """Return whether a step is a product that makes the weights of attention, or applies them."""
    if kind_of(flow, step) is not Kind.PRODUCT:
        return False
    if "attention" in name_of(flow, step):
        return True
    near = {Kind.PASSES, Kind.ADDS, Kind.MULTIPLIES, Kind.ARITHMETIC, Kind.OTHER}
    around = [*_sources(flow, [step], near), *_reached(flow, [step], near)]
    return any(kind_of(flow, other) is Kind.SOFTMAX for other in around)


def _reached(flow: Dataflow, start: Iterable[Step], through: Collection[Kind]) -> list[Step]:
    """Return all known steps that values reach through steps of some kinds, and the first ones behind those."""
    found: dict[Step, None] = {}
    waiting = deque(start)
    while waiting:
        for use in flow.uses(waiting.popleft()):
            if isinstance(use, Step) and use not in found:
                found[use] = None
                if kind_of(flow, use) in through:
                    waiting.append(use)
    return list(found)


def _sources(flow: Dataflow, start: Iterable[Step], through: Collection[Kind]) -> list[Step]:
    """Return all known steps that feed steps through others of some kinds, and the first ones before those."""
    found: dict[Step, None] = {}
    waiting = deque(start)
    while waiting:
        for source in operands(flow, waiting.popleft()):
            if isinstance(source, Step) and source not in found:
                found[source] = None
                if kind_of(flow, source) in through:
                    waiting.append(source)
    return list(found)


def _fed_by(flow: Dataflow, nonlinearity: Step) -> set[nn.Module]:
    """Return the layers that a nonlinearity feeds; a function counts as one of its own.

    Raises
    ------
    NotHidden
        It is a gate, or its output is normalized, or feeds no layer.
    """
    name = name_of(flow, nonlinearity)
    if is_gate(flow, nonlinearity):
        raise Gate(f"a gate: its output, after {name}, multiplies another tensor")
    for use in _reached(flow, [nonlinearity], {Kind.PASSES}):
        if kind_of(flow, use) is Kind.NORMALIZES:
            raise NotHidden(f"{name_of(flow, use)} normalizes its output after {name}")
    through = FOLLOWED | {Kind.NONLINEARITY, Kind.SOFTMAX}
    ends = [use for use in _reached(flow, [nonlinearity], through) if kind_of(flow, use) not in through]
    layers = [end for end in ends if kind_of(flow, end) is not Kind.OUTPUT]
    if not layers:
        unknown = [use.reason for use in flow.uses(nonlinearity) if isinstance(use, Unknown)]
        raise NotHidden(unknown[0] if unknown and not ends else f"an output layer, with {name} behind it")
    return {flow.module(end) or nn.Identity() for end in layers}


def _single_end(flow: Dataflow, nonlinearities: Collection[Step]) -> Step | str:
    """Return the last step of the nonlinearity, or the reason why no layer can be put behind it."""
    ends = list(dict.fromkeys(end_of_formula(flow, step) for step in nonlinearities))
    if len(ends) > 1:
        return f"{len(ends)} nonlinearities take its output"
    return ends[0]
