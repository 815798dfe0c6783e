"""The layers beside a batch normalization layer at inference, and the code that might see what is between them."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from types import CodeType

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from batchnorm.surgery.graph import Dataflow, Step, Unknown, has_hooks
from batchnorm.surgery.graph.metadata import is_metadata
from batchnorm.surgery.norms.formula import is_batch_norm

__all__ = ["Neighbors"]

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
SAME_VALUES = ("contiguous", "clone", "detach")
SHAPED_LIKE = ("reshape_as", "view_as", "expand_as")
"""Methods that read nothing but the shape of their argument."""


STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


class Neighbors:
    """Who feeds whom at inference, where dropout and the layers that were folded return their input.

    Attributes
    ----------
    flow : Dataflow
    gone : set of Module
        Layers that return their input.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self.gone: set[nn.Module] = set()
        self._hidden = dict(_hidden_modules(flow))
        self._read = set(_tensors_read(flow))
        self._owners = Counter(key for module in flow.model.modules() for key in {*map(id, _tensors(module))})

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

    # Other code.

    def why_exposed(self, module: nn.Module) -> str:
        """Return why other code than the known calls may see a module or its tensors; empty if none does."""
        name = type(module).__name__
        if has_hooks(module):
            return f"there are hooks on {name}"
        if module in self._hidden:
            return self._hidden[module]
        if any(id(values) in self._read for values in _tensors(module)):
            return f"the parameters or buffers of {name} are read elsewhere too"
        for call in self.flow.calls(module):
            block = self.flow.model.get_submodule(call.block)
            if is_batch_norm(module) and STATISTICS & _names_in_forward(type(block)):
                return f"the forward of {type(block).__name__} reads running statistics"
        return ""

    def is_tied(self, module: nn.Module) -> bool:
        """Return whether another module has a parameter or buffer of a module too."""
        return any(self._owners[id(values)] > 1 for values in _tensors(module))

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


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _tensors_read(flow: Dataflow) -> Iterator[int]:
    """Iterate over the identities of tensors that forwards read as attributes."""
    for path, block in flow.blocks.items():
        module = flow.model.get_submodule(path)
        named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        named.update(module.named_buffers(remove_duplicate=False))
        for node in block.graph.nodes:
            if node.op == "get_attr" and node.target in named and not all(map(is_metadata, node.users)):
                yield id(named[str(node.target)])


def _hidden_modules(flow: Dataflow) -> Iterator[tuple[nn.Module, str]]:
    """Iterate over the modules that a forward calls which cannot be read, each with that reason.

    They are its children, and what is in an `nn.Sequential` among them whose parts it may call one by one.
    """
    for path, why in flow.unread.items():
        parent = flow.model.get_submodule(path)
        if type(parent).forward is nn.Module.forward:
            continue
        reason = f"{path or type(parent).__name__} cannot be read: {why}"
        for name, child in parent.named_children():
            yield child, reason
            if isinstance(child, nn.Sequential) and not _calls_as_a_whole(parent, name):
                yield from ((each, reason) for each in child.modules() if each is not child)


def _names_in_forward(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of attributes that a forward uses, and the methods of its class that it calls."""
    names: set[str] = set()
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        function = inspect.unwrap(getattr(kind, waiting.pop()))
        codes = [function.__code__] if inspect.isfunction(function) else []
        while codes:
            code = codes.pop()
            names.update(code.co_names)
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        methods = {name for name in names - seen if inspect.isfunction(getattr(kind, name, None))}
        waiting += methods
        seen |= methods
    return frozenset(names)


def _calls_as_a_whole(parent: nn.Module, name: str) -> bool:
    """Return whether the source of a forward shows that it does nothing with a child but call it."""
    try:
        source = inspect.getsource(type(parent).forward)
    except (OSError, TypeError):
        return False
    uses = re.findall(rf"\bself\.{re.escape(name)}\b(\()?", source)
    return bool(uses) and all(uses)
