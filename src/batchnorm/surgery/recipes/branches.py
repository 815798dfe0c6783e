"""Residual branches of a model: the terms of an addition that another term skips over, found by who feeds whom.

In ``x + f(x)`` the branch is f, and in ``g(x) + f(x)``, where g has a single layer with weights and f has more, as in
the first block of a stage of ResNet. A term of which nothing of that kind can be shown is no branch.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from batchnorm.nn.layer import Layer
from batchnorm.surgery.graph import Dataflow, Step
from batchnorm.surgery.graph.blocks import bound_arguments
from batchnorm.surgery.norms.formula import is_batch_norm, read_norm

__all__ = ["branch_ends"]

SUMS: set[object] = {operator.add, operator.iadd, torch.add, "add", "add_"}
SUMS |= {operator.sub, operator.isub, torch.sub, "sub", "sub_"}

PRODUCTS: set[object] = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"}

KEPT: set[object] = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.clone}
KEPT |= {torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.movedim}
KEPT |= {"clone", "contiguous", "to", "type_as", "float", "half", "bfloat16", "double", "div", "div_"}
KEPT |= {"flatten", "reshape", "reshape_as", "view", "view_as", "permute", "transpose", "squeeze", "unsqueeze"}
KEPT |= {operator.truediv, operator.itruediv, torch.div}
"""Functions and methods that only move, drop, round or divide the values of their first argument."""

MULTIPLYING: set[object] = {F.linear, F.conv1d, F.conv2d, F.conv3d, torch.matmul, operator.matmul, torch.einsum}
MULTIPLYING |= {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
"""Functions that multiply by weights, in the place of a layer that does."""

MOST_ON_A_SHORTCUT = 1
"""Layers with weights on a shortcut, which projects its input to other channels; the branch beside it has more."""


class _Term(NamedTuple):
    """A value that an addition adds, and all steps that it depends on: a bit for each."""

    step: Step
    ancestry: int


def branch_ends(flow: Dataflow) -> list[nn.Module]:
    """Return the batch normalization layers that end a residual branch, in the order of the modules.

    Between such a layer and the addition there may be dropout, a gate or scale that multiplies its output, and changes
    of its shape. A layer whose output goes elsewhere too is none, nor one that is called anywhere else.
    """
    search = _Search(flow)
    ends: dict[nn.Module, int] = {}
    for terms, sums in search.additions():
        for term in terms:
            layer = search.end_of_branch(term, [other for other in terms if other is not term], sums)
            if layer is not None:
                ends[layer] = ends.get(layer, 0) + 1
    return [module for module in flow.model.modules() if module in ends and ends[module] == len(flow.calls(module))]


class _Search:
    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self.numbers: dict[Step, int] = {}
        self.steps: list[Step] = []
        self.known: dict[Step, int] = {}
        self.weighted = 0

    # The graph of all steps, whose ancestors are sets of bits.

    def made_by(self, block: str, node: Node) -> Step:
        """Return the step that makes a value, or the furthest one known."""
        return self.flow.followed(Step(block, node))[0]

    def inputs(self, step: Step) -> list[Step]:
        """Return the steps whose outputs a step takes."""
        return [self.made_by(step.block, node) for node in step.node.all_input_nodes]

    def bit(self, step: Step) -> int:
        """Return the bit of a step."""
        if step not in self.numbers:
            self.numbers[step] = len(self.steps)
            self.steps.append(step)
            if self.has_weights(step):
                self.weighted |= 1 << self.numbers[step]
        return 1 << self.numbers[step]

    def ancestry(self, step: Step) -> int:
        """Return the bits of a step and of all steps that it depends on."""
        waiting = [step]
        while waiting:
            last = waiting[-1]
            if last in self.known:
                waiting.pop()
                continue
            inputs = self.inputs(last)
            missing = [each for each in inputs if each not in self.known]
            if missing:
                waiting.extend(missing)
                continue
            found = self.bit(last)
            for each in inputs:
                found |= self.known[each]
            self.known[waiting.pop()] = found
        return self.known[step]

    def has_weights(self, step: Step) -> bool:
        """Return whether a step multiplies by weights."""
        module = self.flow.module(step)
        if module is None:
            return step.node.op == "call_function" and step.node.target in MULTIPLYING
        return not is_batch_norm(module) and any(parameter.dim() >= 2 for parameter in module.parameters())

    def entries(self, region: int) -> int:
        """Return the bits of the steps outside of a region whose outputs it takes."""
        found = 0
        for number, step in enumerate(self.steps):
            if region >> number & 1:
                for each in self.inputs(step):
                    found |= self.bit(each)
        return found & ~region

    # Additions.

    def additions(self) -> Iterator[tuple[list[_Term], list[Step]]]:
        """Iterate over the sums of two values or more: the values, and the steps that add them, the last one first."""
        inner: set[Step] = set()
        found: list[tuple[list[_Term], list[Step]]] = []
        for block, read in self.flow.blocks.items():
            for node in read.graph.nodes:
                sums = [Step(block, node)]
                terms = list(self.residual_terms(sums[0]) or self.addends(sums[0], sums))
                inner.update(sums[1:])
                if len(terms) > 1:
                    found.append((terms, sums))
        return ((terms, sums) for terms, sums in found if sums[0] not in inner)

    def residual_terms(self, step: Step) -> Iterator[_Term] | None:
        """Iterate over the two values that a layer of ours adds, if it is called with a residual."""
        residual = self.residual_of(step)
        if residual is None:
            return None
        shortcut = self.made_by(step.block, residual)
        value = next(iter(bound_arguments(self.layer(step), step.node).values()))
        ancestry = self.bit(step) | self.ancestry(self.made_by(step.block, value))
        return iter([_Term(step, ancestry), _Term(shortcut, self.ancestry(shortcut))])

    def residual_of(self, step: Step) -> Node | None:
        """Return the residual with which a step calls a layer of ours."""
        module = self.flow.module(step)
        if not isinstance(module, Layer):
            return None
        residual = bound_arguments(module, step.node).get("residual")
        return residual if isinstance(residual, Node) else None

    def layer(self, step: Step) -> nn.Module:
        """Return the module that a step calls."""
        module = self.flow.module(step)
        assert module is not None
        return module

    def addends(self, step: Step, sums: list[Step]) -> Iterator[_Term]:
        """Iterate over the values that a step adds; sums that are used for nothing else are taken apart, and listed."""
        if not _is(step, SUMS):
            return
        for argument in step.node.args:
            if isinstance(argument, Node):
                made = self.made_by(step.block, argument)
                if _is(made, SUMS) and self.flow.uses(made) == [step]:
                    sums.append(made)
                    yield from self.addends(made, sums)
                else:
                    yield _Term(made, self.ancestry(made))

    # Branches.

    def end_of_branch(self, term: _Term, others: list[_Term], sums: list[Step]) -> nn.Module | None:
        """Return the batch normalization layer at the end of a term, if another term skips over the term."""
        end = self.last_norm(term.step, sums[0])
        if end is None:
            return None
        way = term.ancestry
        for each in sums:
            way |= self.bit(each)
        for other in others:
            branch = term.ancestry & ~other.ancestry
            if branch & self.bit(end) and self.is_skipped(term, other, branch):
                return self.flow.module(end) if end == sums[0] or self.stays_on(end, way) else None
        return None

    def stays_on(self, end: Step, way: int) -> bool:
        """Return whether the output of a step goes into the steps of a way alone."""
        return all(isinstance(use, Step) and bool(self.bit(use) & way) for use in self.flow.uses(end))

    def is_skipped(self, term: _Term, other: _Term, branch: int) -> bool:
        """Return whether a term skips over another: it is the input of the other's layers, or a projection of it."""
        layers = (branch & self.weighted).bit_count()
        if self.bit(other.step) & term.ancestry:
            return layers > 0
        shortcut = other.ancestry & ~term.ancestry
        start = self.entries(shortcut)
        begin_together = start.bit_count() == 1 and bool(start & self.entries(branch))
        return begin_together and (shortcut & self.weighted).bit_count() <= MOST_ON_A_SHORTCUT < layers

    def last_norm(self, step: Step, addition: Step) -> Step | None:
        """Return the batch normalization layer whose output a value is, but for steps that let 0 be 0."""
        while True:
            module, arguments = self.flow.module(step), list(step.node.args)
            if module is not None and is_batch_norm(module):
                return step if self.ends_with_affine(step, module, addition) else None
            if module is not None:
                values = list(bound_arguments(module, step.node).values())
                if not _scales_its_input(module) or not isinstance(values[0], Node):
                    return None
                step = self.made_by(step.block, values[0])
            elif _is(step, KEPT) and isinstance(arguments[0], Node):
                step = self.made_by(step.block, arguments[0])
            elif _is(step, PRODUCTS):
                factors = [self.made_by(step.block, each) for each in arguments if isinstance(each, Node)]
                ends = [end for factor in factors if (end := self.last_norm(factor, addition)) is not None]
                return ends[0] if len(ends) == 1 else None
            else:
                return None

    def ends_with_affine(self, step: Step, module: nn.Module, addition: Step) -> bool:
        """Return whether a layer's output is 0 where gamma and beta are, or becomes so before its own addition."""
        if self.residual_of(step) is not None:
            return step == addition
        norm = read_norm(module)
        return not isinstance(norm, str) and (norm.activation is None or _scales_its_input(norm.activation))


def _is(step: Step, operations: set[object]) -> bool:
    return step.node.op in ("call_function", "call_method") and step.node.target in operations


def _scales_its_input(module: nn.Module) -> bool:
    """Return whether a module multiplies its input by constants in eval mode, as dropout, DropPath and LayerScale do.

    A copy of it runs on values far from 0 on both sides, where activations differ from a multiple of their input.
    """
    sizes = {parameter.numel() for parameter in module.parameters()} or {3}
    if next(module.children(), None) is not None or len(sizes) > 1 or any(p.is_meta for p in module.parameters()):
        return False
    channels = sizes.pop()
    probe = copy.deepcopy(module).double().eval()
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, channels, 4, 4), (2, 4, channels), (2, channels)):
        values = 100 * torch.randn(shape, generator=generator, dtype=torch.float64)
        try:
            with torch.no_grad():
                scaled, scale = probe(values.clone()), probe(torch.ones_like(values))
        except Exception:  # noqa: BLE001 (it may take another number of dimensions)
            continue
        return isinstance(scaled, Tensor) and scaled.shape == values.shape and torch.allclose(scaled, scale * values)
    return False
