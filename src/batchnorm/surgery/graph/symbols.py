"""The symbols that stand for tensors while torch.fx calls a forward, and the questions that they must not answer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import Tensor
from torch.fx import Node, Proxy, Tracer

__all__ = ["Symbol", "SymbolTracer", "isinstance_of_symbols"]

IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
CONVERSIONS = ("__int__", "__float__", "__index__", "__complex__")


class Symbol(Proxy):
    """A symbol of torch.fx that is more like the tensor it stands for.

    ``y += x`` is an operation in place, and not ``y = y + x``. An argument has the attributes of its type. What a
    symbol cannot tell, as its value, is remembered by the tracer even where the forward catches the error.
    """

    tracer: SymbolTracer

    def __getattr__(self, name: str) -> Any:
        """Return a symbol for an attribute; an argument has those of its type, so that ``hasattr`` is right."""
        if self.node.op == "placeholder" and not hasattr(self.tracer.type_of(self.node), name):
            raise AttributeError(f"{self.tracer.type_of(self.node).__name__} has no attribute {name!r}")
        return super().__getattr__(name)


class SymbolTracer(Tracer):
    """A tracer whose symbols are `Symbol`.

    Attributes
    ----------
    types : dict
        The types of arguments that are no tensors.
    unanswered : str
        The first question about a value that a forward asked, and torch.fx cannot answer.
    """

    proxy_buffer_attributes = True  # else a forward that counts in a buffer would do so while it is traced

    def __init__(self) -> None:
        super().__init__()
        self.types: dict[Node, type] = {}
        self.unanswered = ""

    def proxy(self, node: Node) -> Proxy:
        """Return the symbol for a node."""
        return Symbol(node, self)

    def type_of(self, node: Node) -> type:
        """Return the type of the value that a node stands for."""
        return self.types.get(node, Tensor)

    def to_bool(self, obj: Proxy) -> bool:
        """Raise an error, because the truth of a symbol is not known."""
        self.unanswered = self.unanswered or "it branches on a value"
        return super().to_bool(obj)

    def iter(self, obj: Proxy) -> Iterator[Any]:
        """Raise an error, because the length of a symbol is not known."""
        self.unanswered = self.unanswered or "it iterates over a value"
        return super().iter(obj)


@contextmanager
def isinstance_of_symbols(functions: Iterable[FunctionType]) -> Iterator[None]:
    """Let `isinstance`, as the code of some functions calls it, take a symbol for the value that it stands for.

    That is done by a global name of their modules. A symbol whose ``__class__`` is Tensor would deceive C++ too.
    """
    namespaces = {id(each.__globals__): each.__globals__ for each in functions if "isinstance" not in each.__globals__}
    for namespace in namespaces.values():
        namespace["isinstance"] = _isinstance
    try:
        yield
    finally:
        for namespace in namespaces.values():
            del namespace["isinstance"]


def _isinstance(value: Any, kinds: Any) -> bool:
    return issubclass(value.tracer.type_of(value.node), kinds) if type(value) is Symbol else isinstance(value, kinds)


def _in_place(function: Callable[..., Any]) -> Callable[[Symbol, Any], Proxy]:
    def call(self: Symbol, other: Any) -> Proxy:
        symbol: Proxy = self.tracer.create_proxy("call_function", function, (self, other), {})
        return symbol

    return call


def _unanswered(method: str) -> Callable[[Symbol], Any]:
    def call(self: Symbol) -> Any:
        self.tracer.unanswered = self.tracer.unanswered or f"it takes the {method.strip('_')} of a value"
        raise TypeError(f"{method}() of a symbol")

    return call


for _name in IN_PLACE:
    setattr(Symbol, f"__{_name}__", _in_place(getattr(operator, _name)))
for _name in CONVERSIONS:
    setattr(Symbol, _name, _unanswered(_name))
