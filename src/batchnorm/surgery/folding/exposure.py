"""Code besides the known calls of a layer that may call it, or read its weights: where folding it shows.

What a graph does not show is looked for in the names that the forwards around a layer use.
"""

from __future__ import annotations

import ast
import dis
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from types import CodeType, FunctionType
from typing import NamedTuple

from torch import Tensor, nn

from batchnorm.surgery.derived import own_class
from batchnorm.surgery.folding.arithmetic import STOCK
from batchnorm.surgery.graph import Dataflow, has_hooks
from batchnorm.surgery.graph.blocks import bound_arguments
from batchnorm.surgery.graph.metadata import is_metadata
from batchnorm.surgery.norms.formula import is_batch_norm

__all__ = ["Exposure", "tensors_of", "why_further_arguments"]

STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}
READERS = {"parameters", "named_parameters", "buffers", "named_buffers", "state_dict", "functional_call"}
READERS |= {"_parameters", "_buffers", "get_parameter", "get_buffer", "parameters_to_vector"}
FORWARDS = {kind.forward for kind in STOCK}


class _Code(NamedTuple):
    """What a forward uses, with the methods and functions of its author that it calls.

    Attributes
    ----------
    names : frozenset of str
        Names of attributes, of globals, and strings.
    pairs : frozenset of tuple
        Names of attributes, each after that of the attribute whose it is, as ("conv", "weight") for
        ``self.conv.weight``, or after nothing.
    """

    names: frozenset[str]
    pairs: frozenset[tuple[str, str]]


class Exposure:
    """Who may call the layers of a model, or read them, besides the known calls."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self._codes: dict[nn.Module, _Code] = {}

    def why_called_elsewhere(self, module: nn.Module) -> str:
        """Return which forward that cannot be read may call a module; empty if none does."""
        if module in self._hidden:
            return self._hidden[module]
        for path, around in self._around(module):
            inner = path.split(".")
            if self._path(around) in self.flow.unread and self._code(around).pairs & {*pairwise(inner)}:
                return self._unread(around)
        return ""

    def why_read(self, module: nn.Module) -> str:
        """Return which other code reads the parameters or buffers of a module, or has hooks on it; empty if none."""
        kind = own_class(module).__name__
        if has_hooks(module):
            return f"there are hooks on {kind}"
        for _, around in self._around(module):
            if is_batch_norm(module) and STATISTICS & self._code(around).names:
                return f"the forward of {own_class(around).__name__} reads running statistics"
        if any(id(values) in self._read for values in tensors_of(module)):
            return f"the parameters or buffers of {kind} are read elsewhere too"
        if why := self.why_all_read(module):
            return f"{why}, which give the weights"
        for path, around in self._around(module):
            why = self._why_read_by(around, module, path.partition(".")[0])
            if why:
                return f"the forward of {own_class(around).__name__} {why}"
        return ""

    def why_all_read(self, module: nn.Module) -> str:
        """Return which forward around a module reads the parameters of all in it, new ones too; empty if none."""
        for _, around in self._around(module):
            readers = sorted(READERS & self._code(around).names)
            if readers:
                return f"the forward of {own_class(around).__name__} uses {' and '.join(readers)}"
        return ""

    def _why_read_by(self, around: nn.Module, module: nn.Module, child: str) -> str:
        """Return what a block does with a weight or bias that may be the module's, which is in a child of the block."""
        names, pairs = self._code(around)
        if self._path(around) in self.flow.unread:
            others = dict(around.named_children()).keys() - {child}
            of_others = {name for owner, name in pairs if owner in others}
            of_any = {name for owner, name in pairs if owner not in others}
            used = {"weight", "bias"} & (names - of_others | of_any) - vars(around)["_parameters"].keys()
            return f"cannot be read, and uses {' and '.join(sorted(used))}" if used else ""
        lacks_bias = not is_batch_norm(module) and getattr(module, "bias", None) is None
        return "asks for a bias" if lacks_bias and "bias" in names and not hasattr(around, "bias") else ""

    def _around(self, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over the blocks around a module, each with the path of the module in it."""
        for path in self._paths[module]:
            parts = path.split(".")
            for i in range(len(parts)):
                around = self.flow.model.get_submodule(".".join(parts[:i]))
                if type(around).forward not in (nn.Module.forward, nn.Sequential.forward):
                    yield ".".join(parts[i:]), around

    def _code(self, module: nn.Module) -> _Code:
        if module not in self._codes:
            self._codes[module] = _code_of(module)
        return self._codes[module]

    def _path(self, module: nn.Module) -> str:
        return self.flow.path(module)

    def _unread(self, block: nn.Module) -> str:
        path = self._path(block)
        return f"{path or own_class(block).__name__} cannot be read: {self.flow.unread[path]}"

    @cached_property
    def _paths(self) -> dict[nn.Module, list[str]]:
        found: dict[nn.Module, list[str]] = {}
        for path, module in self.flow.model.named_modules(remove_duplicate=False):
            if path:
                found.setdefault(module, []).append(path)
        return found

    @cached_property
    def _read(self) -> set[int]:
        """The identities of tensors that forwards read as attributes."""
        found = set()
        for path, block in self.flow.blocks.items():
            module = self.flow.model.get_submodule(path)
            named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
            named.update(module.named_buffers(remove_duplicate=False))
            for node in block.graph.nodes:
                if node.op == "get_attr" and node.target in named and not all(map(is_metadata, node.users)):
                    found.add(id(named[str(node.target)]))
        return found

    @cached_property
    def _hidden(self) -> dict[nn.Module, str]:
        """The modules that a forward calls which cannot be read, each with that reason.

        They are its children, and what is in an `nn.Sequential` among them whose parts it may call one by one.
        """
        found: dict[nn.Module, str] = {}
        for path in self.flow.unread:
            parent = self.flow.model.get_submodule(path)
            if type(parent).forward is nn.Module.forward:
                continue
            reason = self._unread(parent)
            for name, child in parent.named_children():
                found[child] = reason
                if isinstance(child, nn.ModuleList | nn.ModuleDict):
                    found.update(dict.fromkeys(child.children(), reason))
                if isinstance(child, nn.Sequential) and not _calls_as_a_whole(parent, name):
                    found.update(dict.fromkeys((each for each in child.modules() if each is not child), reason))
        return found


def why_further_arguments(flow: Dataflow, layer: nn.Module) -> str:
    """Return why a call of a layer with a forward of its own may compute something else; empty if none does."""
    if own_class(layer).forward in FORWARDS:
        return ""
    for call in flow.calls(layer):
        further = [*bound_arguments(layer, call.node)][1:]
        if further:
            kind = own_class(layer).__name__
            return f"{kind}, which has a forward of its own, is called with {' and '.join(further)} too"
    return ""


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module, without those of its children."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _code_of(module: nn.Module) -> _Code:
    """Return what the forward of a module uses; methods and functions of torch are not looked into."""
    names, pairs = set[str](), set[tuple[str, str]]()
    waiting: list[object] = [vars(module).get("forward", own_class(module).forward)]
    seen: list[object] = []
    while waiting:
        function = inspect.unwrap(waiting.pop())  # type: ignore[arg-type]
        function = getattr(function, "__func__", function)
        if not isinstance(function, FunctionType) or function in seen or _is_of_torch(function):
            continue
        seen.append(function)
        used, its_pairs = _used(function.__code__)
        if READERS & used and not _reads_weights(function):
            used = used - READERS
        names |= used
        pairs |= its_pairs
        followed = [name for name in used if not hasattr(nn.Module, name)]
        waiting += [vars(module).get(name, inspect.getattr_static(own_class(module), name, None)) for name in followed]
        waiting += [function.__globals__.get(name) for name in followed]
        if "super" in used:
            waiting += [vars(base)["forward"] for base in own_class(module).__mro__ if "forward" in vars(base)]
    return _Code(frozenset(names), frozenset(pairs))


def _used(code: CodeType) -> tuple[set[str], set[tuple[str, str]]]:
    names, pairs = set(code.co_names), set[tuple[str, str]]()
    before = ""
    for step in dis.get_instructions(code):
        attribute = step.argval if step.opname in ("LOAD_ATTR", "LOAD_METHOD") else ""
        if attribute:
            pairs.add((before, attribute))
        before = attribute
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _used(constant)
            names |= inner[0]
            pairs |= inner[1]
        elif isinstance(constant, str) and constant.isidentifier():
            names.add(constant)  # as in getattr(layer, "weight")
    return names, pairs


def _is_of_torch(function: FunctionType) -> bool:
    return (function.__module__ or "").startswith("torch.")


def _reads_weights(function: FunctionType) -> bool:
    """Return whether a function may read more of parameters than one's dtype or device."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return True
    harmless = {id(part) for node in ast.walk(tree) for part in _harmless_parts(node)}
    return any(id(node) not in harmless and _named(node) in READERS for node in ast.walk(tree))


def _harmless_parts(node: ast.AST) -> Iterator[ast.AST]:
    """Iterate over the nodes in ``next(model.parameters()).dtype``, or the one of ``signature(f).parameters``."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call):
        called = _named(node.value.func)
        if called == "next" and node.attr in ("dtype", "device"):
            yield from ast.walk(node.value)
        if called == "signature":
            yield node


def _named(node: ast.AST) -> str:
    """Return the name that a node of a syntax tree has, or the string that it is; else ""."""
    found = [getattr(node, field, None) for field in ("attr", "id", "value")]
    return next((name for name in found if isinstance(name, str)), "")


def _calls_as_a_whole(parent: nn.Module, name: str) -> bool:
    """Return whether the source of a forward shows that it does nothing with a child but call it."""
    try:
        source = inspect.getsource(own_class(parent).forward)
    except (OSError, TypeError):
        return False
    uses = re.findall(rf"\bself\.{re.escape(name)}\b(\()?", source)
    return bool(uses) and all(uses)
