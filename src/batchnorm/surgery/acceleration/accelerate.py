"""Our layers in the place of a model's own, doing the activations and additions that follow them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn
from torch.fx import GraphModule

from batchnorm.checks import Activation
from batchnorm.nn.layer import Layer
from batchnorm.surgery.acceleration.adjacency import always_together, method_that_names, reached_from_outside
from batchnorm.surgery.acceleration.fused_graphs import fuse
from batchnorm.surgery.acceleration.fusing import Fusion, find_fusions, only_call
from batchnorm.surgery.acceleration.rewriting import Forward, attributes_read, bypassed, forward_from
from batchnorm.surgery.conversion.changes import kind_of
from batchnorm.surgery.conversion.convert import convert
from batchnorm.surgery.derived import derive
from batchnorm.surgery.examples import Example, check_kept, eval_outputs
from batchnorm.surgery.graph import Dataflow, read_dataflow
from batchnorm.surgery.graph.dataflow import has_hooks
from batchnorm.surgery.graph.tracing import Unreadable, symbols_of, traced
from batchnorm.surgery.norms.formula import ACTIVATIONS
from batchnorm.surgery.opening import COPIES, batch_norms, opened
from batchnorm.surgery.report import Left, Replacement, Surgery

__all__ = ["accelerate"]


def accelerate(model: nn.Module, example: Example | None = None, inplace: bool = False) -> tuple[nn.Module, Surgery]:
    """Replace the batch norm layers by ours, and let them do the activations and additions that follow them.

    A batch norm, the addition of a residual and an activation become one call, ``layer(x, residual)``, where nothing
    else sees what passes between them: ReLU, LeakyReLU(0.01), SiLU, GELU, Tanh and Sigmoid, as modules of their own or
    shared, as functions, as methods, and in place. Outputs, gradients and running statistics are the same but for
    rounding. In the place of an activation that is done comes ``nn.Identity``, so that names stay. Where functions,
    shared modules or additions are concerned, the smallest block around them gets a new forward, which torch.fx writes.
    It refuses optional arguments other than those that the model passes, and attributes that have changed since.

    Hooks see what they saw before: a layer or an activation that has some is left as it is.

    Parameters
    ----------
    model : Module
    example : tensor, tuple or mapping, optional
        Arguments for the model. It tells who feeds whom where torch.fx cannot trace the code, and the report then has
        the largest difference of the outputs.
    inplace : bool
        Change the model given, with the same parameters and buffers, so that an optimizer keeps working.

    Returns
    -------
    tuple of Module and Surgery
        The model, by default a deep copy, and a report of the layers, what each does now, and the reason where it does
        nothing but batch normalization.

    Raises
    ------
    InputTypeError
        The model is no module, or the example none of the kinds above.
    InputError
        The model has no batch normalization layers, or does not take the example.
    UnsupportedError
        The model is wrapped, compiled, scripted or quantized, or the outputs on the example would change.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> model, report = bn.accelerate(model, inplace=True)
    >>> print(report)
    layer        before                after
    1       BatchNorm2d   BatchNorm2d + ReLU
    """
    operated = opened(model, "accelerate", inplace=inplace)
    batch_norms(operated, "accelerate")
    if example is not None and inplace:
        accelerate(operated, example)  # which raises an error where outputs change, with the model untouched
    before = None if example is None else eval_outputs(operated, example)
    operated, converted = convert(operated, inplace=True)
    layers = {path: module for path, module in operated.named_modules() if isinstance(module, Layer)}
    dataflow = read_dataflow(operated, example)
    plan = _planned(dataflow, find_fusions(dataflow, layers))
    plan.apply(operated)
    rows, left = _rows(converted, layers, plan), _left(converted, layers, plan)
    difference = None
    if example is not None and before is not None:
        difference = check_kept("accelerate", before, eval_outputs(operated, example))
    return operated, Surgery(rows, left, difference, tuple(_notes(operated, converted, plan, inplace=inplace)))


def _rows(converted: Surgery, layers: Mapping[str, Layer], plan: _Plan) -> tuple[Replacement, ...]:
    """Return what has become of each layer that was changed."""
    before = {row.path: row for row in converted.layers}
    return tuple(
        Replacement(path, before[path].before if path in before else type(layer).__name__, _after(path, layer, plan))
        for path, layer in layers.items()
        if path in before or path in plan.activations or path in plan.added
    )


def _after(path: str, layer: Layer, plan: _Plan) -> str:
    parts = [type(layer).__name__, *(["add"] if path in plan.added else [])]
    if parts == [type(layer).__name__] and layer.activation is None:
        return kind_of(layer)  # it was converted, and takes over nothing
    return " + ".join([*parts, *([] if layer.activation is None else [ACTIVATIONS[layer.activation].__name__])])


def _left(converted: Surgery, layers: Mapping[str, Layer], plan: _Plan) -> tuple[Left, ...]:
    """Return the layers that could not be converted, and those that take over no other step."""
    alone = [Left(path, type(layers[path]).__name__, plan.reasons[path]) for path in layers if path in plan.reasons]
    return (*(each for each in converted.left if each.path not in layers), *alone)


def _notes(model: nn.Module, converted: Surgery, plan: _Plan, *, inplace: bool) -> Iterable[str]:
    yield from converted.notes
    if not inplace:
        yield COPIES
    devices = sorted({values.device.type for values in model.parameters()} - {"cpu", "meta"})
    if devices:
        yield (
            f"The model is on {', '.join(devices)}, where these layers run in operations of torch: accelerate makes "
            "training faster on the CPU."
        )


@dataclass
class _Plan:
    """What is to be done, decided before the first change.

    Attributes
    ----------
    forwards : dict
        New forwards, by the path of the block.
    activations : dict
        The activation of each layer that takes one over, by path.
    idle : dict
        The modules in whose place comes an identity, and the layer that does their work, by path.
    added : set
        The layers that take over an addition.
    reasons : dict
        Why the other layers take over nothing, by path.
    """

    forwards: dict[str, Forward] = field(default_factory=dict)
    activations: dict[str, Activation] = field(default_factory=dict)
    idle: dict[nn.Module, str] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Change the model."""
        for path, forward in self.forwards.items():
            derive(model.get_submodule(path), forward)
        for path, activation in self.activations.items():
            layer = model.get_submodule(path)
            assert isinstance(layer, Layer)
            layer.activation = activation
        for module in [*model.modules()]:
            for name, child in [*module._modules.items()]:
                if child in self.idle:
                    idle = nn.Identity().train(child.training)
                    vars(idle)["stands_for"] = (child, model.get_submodule(self.idle[child]))
                    module.register_module(name, idle)


def _planned(dataflow: Dataflow, found: Mapping[str, Fusion | str]) -> _Plan:
    plan = _Plan()
    in_code: dict[str, list[_InCode]] = {}
    for path, fusion in found.items():
        if isinstance(fusion, str):
            plan.reasons[path] = fusion
        elif reason := _reached(dataflow, fusion):
            plan.reasons[path] = reason
        elif (module := _idle_activation(dataflow, fusion)) is not None:
            assert fusion.name is not None
            plan.activations[path] = fusion.name
            plan.idle[module] = fusion.layer
        else:
            block, inlined = _place(dataflow, fusion)
            in_code.setdefault(block, []).append(_InCode(fusion, inlined))
    while moved := _inner_and_outer(in_code):  # fusions in a block that another one inlines are done there
        inner, outer = moved
        in_code[outer] += [_InCode(each.fusion, each.inlined | {inner}) for each in in_code.pop(inner)]
    for path, wanted in in_code.items():
        done = _rewrite(dataflow, plan, path, wanted)
        without_inlined = [each for each in wanted if not each.inlined]
        if not done and without_inlined and len(without_inlined) < len(wanted):
            _rewrite(dataflow, plan, path, without_inlined)
    return plan


class _InCode(NamedTuple):
    """A fusion that needs a new forward, and the paths of the blocks whose forwards become part of it."""

    fusion: Fusion
    inlined: frozenset[str]


def _idle_activation(dataflow: Dataflow, fusion: Fusion) -> nn.Module | None:
    """Return the module of an activation that does nothing else; None if the fusion needs a new forward."""
    if fusion.addition is not None or fusion.activation is None:
        return None
    module = dataflow.module(fusion.activation)
    if module is None or isinstance(only_call(dataflow, module), str):
        return None
    path, inlined = _place(dataflow, fusion)
    blocks = [dataflow.model.get_submodule(each) for each in inlined]
    if any(type(block).forward is not nn.Sequential.forward or method_that_names(block, "") for block in blocks):
        return None
    names = [_child(path, each) for each in (fusion.layer, dataflow.path(module))]
    return module if always_together(dataflow.model.get_submodule(path), *names) else None


def _child(block: str, path: str) -> str:
    """Return the name of the child of a block that has a module."""
    return path.removeprefix(f"{block}." if block else "").partition(".")[0]


def _reached(dataflow: Dataflow, fusion: Fusion) -> str:
    """Return why the layer of a fusion may be called by other code than the forwards around it; empty if it is not."""
    path, inlined = _place(dataflow, fusion)
    for each in (path, *sorted(inlined)):
        names = {str(step.node.target) for step in fusion.steps if step.block == each and step.node.op == "call_module"}
        reason = reached_from_outside(dataflow, each, names)
        if reason:
            return reason
    return ""


def _place(dataflow: Dataflow, fusion: Fusion) -> tuple[str, frozenset[str]]:
    """Return the innermost block that runs all steps of a fusion, and the blocks between it and the steps."""
    chains = [_callers(dataflow, step.block) for step in fusion.steps]
    block = next(each for each in chains[0] if all(each in chain for chain in chains))
    return block, frozenset(each for chain in chains for each in chain[: chain.index(block)])


def _callers(dataflow: Dataflow, block: str) -> list[str]:
    """Return a block and those around it, each of which is called by the next alone."""
    found = [block]
    while len(calls := dataflow.calls(dataflow.model.get_submodule(found[-1]))) == 1 and calls[0].block not in found:
        found.append(calls[0].block)
    return found


def _inner_and_outer(in_code: Mapping[str, list[_InCode]]) -> tuple[str, str] | None:
    for outer, wanted in in_code.items():
        for inner in in_code:
            if any(inner in each.inlined for each in wanted):
                return inner, outer
    return None


def _rewrite(dataflow: Dataflow, plan: _Plan, path: str, wanted: list[_InCode]) -> bool:
    """Add the new forward of a block to the plan, or the reason why there is none; return whether there is one."""
    made = _forward(dataflow, path, wanted, plan.reasons)
    if isinstance(made, str):
        plan.reasons |= {each.fusion.layer: made for each in wanted}
        return False
    done = [each.fusion for each in wanted if each.fusion.layer not in plan.reasons]
    if done:
        plan.forwards[path] = made
    plan.activations |= {fusion.layer: fusion.name for fusion in done if fusion.name is not None}
    plan.added |= {fusion.layer for fusion in done if fusion.addition is not None}
    return True


def _forward(dataflow: Dataflow, path: str, wanted: list[_InCode], reasons: dict[str, str]) -> Forward | str:
    """Return the forward of a block in which its layers do what follows them, or the reason why there is none."""
    block = dataflow.model.get_submodule(path)
    inlined = sorted(frozenset().union(*(each.inlined for each in wanted)))
    for each in (path, *inlined):
        if dataflow.blocks[each].reason_against_code:
            return dataflow.blocks[each].reason_against_code
        module = dataflow.model.get_submodule(each)
        if hasattr(type(module).forward, "__wrapped__"):
            return f"the forward of {type(module).__name__} is wrapped by a decorator"
        for fusion, _ in wanted:
            method = fusion.layer.startswith(f"{each}." if each else "") and method_that_names(
                module, _child(each, fusion.layer)
            )
            if method:
                return f"{type(module).__name__}.{method} uses it too"
        if each != path and has_hooks(module):
            return f"hooks on {each} see what it returns"
    if isinstance(block, GraphModule):
        return f"{path or 'the model'} is a GraphModule, whose code belongs to its graph"
    known = dataflow.blocks[path]
    arguments = known.constants | symbols_of(known.graph)
    try:
        with attributes_read(block) as read:
            new = traced(block, arguments, [dataflow.model.get_submodule(each) for each in inlined])
            reads = read()
    except Unreadable as error:
        return str(error)
    if new.reason_against_code:
        return new.reason_against_code
    activations = {}
    for fusion, _ in wanted:
        layer = fusion.layer.removeprefix(f"{path}.") if path else fusion.layer
        gone = fuse(new.graph, block, layer, adds=fusion.addition is not None, activates=fusion.activation is not None)
        if isinstance(gone, str):
            reasons[fusion.layer] = gone
        else:
            reads |= bypassed(block, gone)
            activations[layer] = fusion.name or ""
            reasons.pop(fusion.layer, None)
    return forward_from(block, new.graph, new.constants, reads, activations)
