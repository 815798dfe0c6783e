"""Which activation, and which addition, each batch norm layer of a model can take over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from batchnorm.checks import Activation
from batchnorm.nn.layer import Layer, overrides_forward
from batchnorm.surgery.acceleration.patterns import ADDITIONS, activation_of, addends, changes_in_place, kind_of
from batchnorm.surgery.graph import Dataflow, Step, Unknown
from batchnorm.surgery.graph.dataflow import has_hooks
from batchnorm.surgery.norms.children import children_behind

__all__ = ["Fusion", "find_fusions", "only_call"]


@dataclass(frozen=True)
class Fusion:
    """The steps that a layer takes over.

    Attributes
    ----------
    layer : str
        Its path.
    call : Step
        The one call of the layer.
    addition, activation : Step or None
        They follow in this order.
    name : str or None
        The activation, as an option of our layers.
    """

    layer: str
    call: Step
    addition: Step | None = None
    activation: Step | None = None
    name: Activation | None = None

    @property
    def steps(self) -> list[Step]:
        """All steps, in order."""
        return [step for step in (self.call, self.addition, self.activation) if step is not None]


def find_fusions(dataflow: Dataflow, layers: Mapping[str, Layer]) -> dict[str, Fusion | str]:
    """Return for each layer without an activation its fusion, or the reason why there is none: a clause.

    An addition of the outputs of two layers goes to the one that is called in the same block, and else to the first.
    """
    found = {path: _fusion(dataflow, path, layer) for path, layer in layers.items() if layer.activation is None}
    takers: dict[Step, Fusion] = {}
    for fusion in found.values():
        if isinstance(fusion, Fusion) and fusion.addition is not None:
            taker = takers.setdefault(fusion.addition, fusion)
            if _claim(dataflow, fusion) < _claim(dataflow, taker):
                takers[fusion.addition] = fusion
    for path, fusion in found.items():
        if isinstance(fusion, Fusion) and fusion.addition is not None and takers[fusion.addition] is not fusion:
            found[path] = "the batch norm to whose output its own is added does the addition"
    return found


def _claim(dataflow: Dataflow, fusion: Fusion) -> tuple[bool, bool]:
    """Return a key that is smallest for the layer that should take an addition."""
    assert fusion.addition is not None
    first = dataflow.source(fusion.addition, 0)
    return fusion.call.block != fusion.addition.block, first != fusion.call


def only_call(dataflow: Dataflow, module: nn.Module) -> Step | str:
    """Return the only step that calls a module, however often its block runs; or the reason why it is not known."""
    calls, path = dataflow.calls(module), dataflow.path(module)
    unread = next((around for around in _ancestors(path) if around in dataflow.unread), None)
    if unread is not None and not calls:
        return f"the code around it cannot be read: {dataflow.unread[unread]}"
    if len(calls) != 1:
        return dataflow.why_no_single_call(module)
    seen, block = dataflow.observed.get(path, 0), dataflow.observed.get(calls[0].block, 0)
    if dataflow.observed and seen != block:
        return f"{path} is called {seen} times on the example, and its block {block} times"
    return calls[0]


def _ancestors(path: str) -> list[str]:
    """Return the paths of the modules around one, from the innermost."""
    names = path.split(".")
    return [".".join(names[:i]) for i in reversed(range(len(names)))]


def _fusion(dataflow: Dataflow, path: str, layer: Layer) -> Fusion | str:
    if has_hooks(layer):
        return "hooks on it see its input and output"
    behind = [layer.get_submodule(name) for name in children_behind(layer)]
    if behind:
        return f"{', '.join(type(child).__name__ for child in behind)} follows, which has no fused kernel"
    if overrides_forward(layer):
        return f"{type(layer).__name__} has a forward of its own"
    call = only_call(dataflow, layer)
    if isinstance(call, str):
        return call
    if len(call.node.args) != 1 or call.node.kwargs:
        return "it is called with more than its input"
    use, later = _sole_use(dataflow, call, [])
    if isinstance(use, str):
        return use
    fusion = _activated(dataflow, Fusion(path, call), use)
    if fusion is not None:
        return fusion
    if addends(use.node) is None:
        return _nothing_to_fuse(dataflow, use)
    summed = Fusion(path, call, use)
    use, _ = _sole_use(dataflow, use, later)
    fusion = None if isinstance(use, str) else _activated(dataflow, summed, use)
    return fusion or summed


def _activated(dataflow: Dataflow, fusion: Fusion, use: Step) -> Fusion | None:
    """Return the fusion with the activation that follows; None if no activation that our layers have follows."""
    module = dataflow.module(use)
    name = activation_of(use.node, module)
    if name is None or (module is not None and has_hooks(module)):
        return None
    return Fusion(fusion.layer, fusion.call, fusion.addition, use, name)


def _sole_use(dataflow: Dataflow, step: Step, later: list[Step]) -> tuple[Step | str, list[Step]]:
    """Return the only step that takes an output, or the reason why it is not known; and later uses of the same memory.

    Where the first of several steps writes over the value, the others take its result.

    Parameters
    ----------
    dataflow : Dataflow
    step : Step
    later : list of Step
        Uses of a value that the step has written over.
    """
    uses = [*dataflow.uses(step), *later]
    for use in uses:
        if isinstance(use, Unknown):
            return f"its output cannot be followed: {use.reason}", []
    steps = [use for use in uses if isinstance(use, Step)]
    if not steps:
        return "nothing takes its output", []
    if len(steps) == 1:
        return steps[0], []
    if all(use.block == step.block for use in steps):
        first = min(steps, key=_position)
        if changes_in_place(first.node, dataflow.module(first)):
            return first, [use for use in steps if use is not first]
    return f"{len(steps)} steps take its output: {', '.join(_kind(dataflow, use) for use in steps)}", []


def _position(step: Step) -> int:
    return list(step.node.graph.nodes).index(step.node)


def _kind(dataflow: Dataflow, step: Step) -> str:
    return "the end of the model" if step.node.op == "output" else kind_of(step.node, dataflow.module(step))


def _nothing_to_fuse(dataflow: Dataflow, use: Step) -> str:
    """Return the reason why the step that follows a layer cannot be fused."""
    module = dataflow.module(use)
    if module is not None and has_hooks(module) and activation_of(use.node, module) is not None:
        return f"hooks on {dataflow.path(module)}, the {type(module).__name__} that follows, see its input"
    if use.node.op == "output":
        return "the model returns its output"
    if use.node.target in ADDITIONS:
        return "it is not added to the output of a single other step"
    kind = _kind(dataflow, use)
    if module is not None and type(module).__module__ == nn.ReLU.__module__:
        return f"{kind} follows, which has no fused kernel"
    return f"{kind} follows, and neither an activation nor an addition"
