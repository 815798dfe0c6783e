"""The layers beside a batch normalization layer at inference."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn
from torch.fx import Node
from torch.nn import functional as F

from batchnorm.surgery.folding.arithmetic import STOCK
from batchnorm.surgery.folding.exposure import Exposure, tensors_of
from batchnorm.surgery.graph import Dataflow, Step, Unknown, has_hooks

__all__ = ["Neighbors"]

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
SAME_VALUES = ("contiguous", "clone", "detach")
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
READING = (operator.add, operator.mul, operator.sub, torch.add, torch.mul, torch.cat, "add", "mul", "sub")
SHAPED_LIKE = ("reshape_as", "view_as", "expand_as")
"""Methods that read nothing but the shape of their argument."""


class Neighbors:
    """Who feeds whom at inference, where dropout and the layers that were folded return their input.

    Attributes
    ----------
    flow : Dataflow
    exposure : Exposure
    gone : set of Module
        Layers that return their input.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self.gone: set[nn.Module] = set()
        self.exposure = Exposure(flow)
        self._owners = Counter(key for module in flow.model.modules() for key in {*map(id, tensors_of(module))})

    def source(self, step: Step, argument: int = 0) -> Step | Unknown:
        """Return the step whose output a step takes as an argument."""
        found = self.flow.source(step, argument)
        while isinstance(found, Step) and self._passes(found):
            found = self.flow.source(found)
        return found

    def uses(self, step: Step) -> Iterator[Step | Unknown]:
        """Iterate over the steps that take the values of a step's output."""
        for use in self.flow.uses(step):
            if isinstance(use, Unknown):
                yield use
            elif self._passes(use):
                yield from self.uses(use)
            elif use.node.target not in SHAPED_LIKE or self.source(use) == step:
                yield use

    # A linear layer treats (N, L, C) as it treats the (N * L, C) that flatten(0, 1) makes of it.

    def source_of_rows(self, step: Step) -> Step | Unknown:
        """Return the source of a step; where flatten(0, 1) is between it and a linear layer, that layer."""
        found = self.source(step)
        if isinstance(found, Step) and _merges_rows(found.node):
            behind = self.source(found)
            if isinstance(behind, Step) and isinstance(self.flow.module(behind), nn.Linear):
                return behind
        return found

    def uses_of_rows(self, step: Step) -> Iterator[Step | Unknown]:
        """Iterate over the uses of the output of a linear layer, with those of flatten(0, 1) in its place."""
        for use in self.uses(step):
            if isinstance(use, Step) and _merges_rows(use.node):
                yield from self.uses(use)
            else:
                yield use

    def _passes(self, step: Step) -> bool:
        module, node = self.flow.module(step), step.node
        if module is not None:
            return module in self.gone or (type(module) in DROPOUTS and not has_hooks(module))
        if node.op == "call_method":
            return node.target in SAME_VALUES
        return node.op == "call_function" and node.target in DROPOUT_FUNCTIONS and not _trains(node)

    def input_may_change(self, call: Step, calls: Collection[Step]) -> bool:
        """Return whether other steps than calls of one layer may write into the memory of what a call takes."""
        known = {*calls}
        waiting = [Step(call.block, node) for node in call.node.all_input_nodes[:1]]
        while waiting:
            maker, reason = self.flow.followed(waiting.pop())
            is_input = maker.node.op == "placeholder" and maker.block == ""
            if maker.node.op == "get_attr" or (reason and not is_input):
                return True
            if any(use not in known and not self._only_reads(use) for use in self.flow.uses(maker)):
                return True
            known.add(maker)
            if type(self.flow.module(maker)) not in STOCK:  # it may return its input, or a view
                waiting += [Step(maker.block, node) for node in maker.node.all_input_nodes]
        return False

    def _only_reads(self, step: Step | Unknown) -> bool:
        """Return whether a step writes nothing into its inputs, and returns new memory."""
        if isinstance(step, Unknown) or "out" in step.node.kwargs:
            return False
        module, node = self.flow.module(step), step.node
        return type(module) in (*STOCK, *POOLS) if module is not None else node.op == "output" or node.target in READING

    # Other code.

    def why_exposed(self, module: nn.Module) -> str:
        """Return why other code than the known calls may see a module or its tensors; empty if none does."""
        return self.exposure.why_called_elsewhere(module) or self.exposure.why_read(module)

    def is_tied(self, module: nn.Module) -> bool:
        """Return whether another module has a parameter or buffer of a module too."""
        return any(self._owners[id(values)] > 1 for values in tensors_of(module))

    # Words.

    def described(self, steps: Sequence[Step | Unknown]) -> str:
        """Return the names of steps, as in "Conv2d and add"."""
        names = dict.fromkeys(step.reason if isinstance(step, Unknown) else self._name(step) for step in steps)
        return " and ".join(names) or "nothing"

    def _name(self, step: Step) -> str:
        module, node = self.flow.module(step), step.node
        if module is not None:
            return type(module).__name__
        if node.op in ("output", "placeholder"):
            return f"the {'output' if node.op == 'output' else 'input'} of the model"
        return getattr(node.target, "__name__", str(node.target))


def _trains(dropout: Node) -> bool:
    """Return whether a call of a function for dropout may drop anything at inference."""
    training = dropout.kwargs.get("training", dropout.args[2] if len(dropout.args) > 2 else None)
    if isinstance(training, Node):  # self.training is a node in graphs for both modes
        return not (training.op == "get_attr" and str(training.target).rpartition(".")[2] == "training")
    return training is not False


def _merges_rows(node: Node) -> bool:
    """Return whether a step is ``flatten(0, 1)``."""
    if not ((node.op == "call_method" and node.target == "flatten") or node.target is torch.flatten):
        return False
    given = {**dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)), **node.kwargs}
    return (given.get("start_dim"), given.get("end_dim")) == (0, 1)
