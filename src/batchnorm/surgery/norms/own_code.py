"""What the class of a layer adds to torch's: the attributes that its forward uses, and the members that would be lost.

No run of a forward shows what a flag that is set later would change. So its code is read: that of the class, of the
methods that it calls, and of the bases that are not torch's.
"""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = ["batch_sizes_in", "lost_member", "reason_against_code", "reason_against_train"]

STATE = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
KNOWN = {*vars(nn.BatchNorm1d(1)), *vars(nn.SyncBatchNorm(1)), *STATE}
"""Attributes of every layer."""

HIDING = {"__dict__", "setattr", "vars", "globals", "getattr", "__getattribute__", "__class__"}
"""Names by which a forward uses attributes that its code does not name, unless it names them as texts."""

LAST_BATCH_SIZE = 10_000

DESCRIBING = {
    *("__init__", "__new__", "__doc__", "__module__", "__qualname__", "__annotations__", "__dict__", "__weakref__"),
    *(
        "__firstlineno__",
        "__static_attributes__",
        "__annotate_func__",
        "__annotations_cache__",
        "__conditional_annotations__",
    ),
    *("__constants__", "__parameters__", "__orig_bases__", "__abstractmethods__", "_abc_impl", "__init_subclass__"),
    *("__repr__", "__str__", "extra_repr", "_get_name", "_version", "cls_to_become", "_own_class", "_changes"),
}
"""Members of a class that make or describe a layer."""


def reason_against_code(module: nn.Module) -> str:
    """Return why the forward of a layer's class may do more than any run of it shows; empty if it may not."""
    return _reason(module, "forward", "its own forward")


def reason_against_train(module: nn.Module) -> str:
    """Return the same of its method ``train``."""
    return _reason(module, "train", "its own train()")


def _reason(module: nn.Module, method: str, subject: str) -> str:
    own = {*vars(module), *module._parameters, *module._buffers} - KNOWN
    for function in _functions(module, method):
        changeable = _changeable(function)
        if changeable:
            return f"{subject} reads {changeable[0]}, which may change"
    for code in _codes(module, method):
        set_ = sorted(name for name in _stored(code) if name not in STATE)
        if set_:
            return f"{subject} sets the attribute {set_[0]}"
        texts = _texts(code.co_consts)
        used = {*code.co_names, *texts}
        read = sorted(name for name in used & own if not _is_eps(vars(module).get(name)))
        read += sorted(name for name in used if _is_data(module, name))
        if read:
            return f"{subject} reads the attribute {read[0]}, which a layer of batchnorm's would not"
        hiding = sorted(HIDING.intersection(code.co_names) - ({"getattr"} if texts & {*KNOWN, *own} else set()))
        if hiding:
            return f"{subject} uses {hiding[0]}, which may read or set any attribute"
    return ""


def _is_eps(value: Any) -> bool:
    """Return whether an attribute may be an eps under another name, which is measured."""
    return isinstance(value, float) and 0 < value < 0.01


def batch_sizes_in(module: nn.Module) -> list[int]:
    """Return sizes of batches, and counts of them, beside those that the code of a layer's forward names."""
    numbers = {
        number
        for code in _codes(module, "forward")
        for number in code.co_consts
        if type(number) is int and 1 < number <= LAST_BATCH_SIZE
    }
    for function in _functions(module, "forward"):
        values = [function.__globals__.get(name) for name in function.__code__.co_names]
        values += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        numbers |= {value for value in values if type(value) is int and 1 < value <= LAST_BATCH_SIZE}
    return sorted({size for number in numbers for size in (number, number + 1, 2 * number)})


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def lost_member(module: nn.Module) -> str:
    """Return a member of a layer's class that another class would not have; empty if there is none."""
    used = {function.__name__ for function in _functions(module, "forward")}
    for base in _added(module):
        for name, value in vars(base).items():
            if name in DESCRIBING or name in ("forward", "_check_input_dim") or isinstance(value, classmethod):
                continue
            if name.startswith("_") and name in used:
                continue
            if name == "train" and not reason_against_train(module):
                continue  # it stays in eval mode, or is found to do nothing: `stays_in_eval`
            if name == "_load_from_state_dict" and _only_fills(value):
                continue
            return name
    return ""


def _only_fills(load: Any) -> bool:
    """Return whether a loader of state dicts treats torch's names alone: drops a count, or adds what is missing.

    So do those of torchvision's FrozenBatchNorm2d and detectron2's. One that computes with eps changes old values.
    """
    code = load.__code__
    texts = {each for each in _texts(code.co_consts) if " " not in each.strip() and each != "."}
    return texts <= {*STATE, "version"} and "eps" not in code.co_names


def _added(module: nn.Module) -> list[type]:
    """Return the classes of a layer that are not torch's; that of parametrizations goes on, and is none of them."""
    mro = type(module).__mro__[1 if is_parametrized(module) else 0 :]
    stock = next(base for base in mro if base.__module__.startswith("torch."))
    return [base for base in mro if not issubclass(stock, base)]


def _functions(module: nn.Module, method: str) -> Iterator[types.FunctionType]:
    """Iterate over a method of a layer's class and all that it calls by name, in the classes that are not torch's."""
    names, seen = [method], {method}
    while names:
        name = names.pop()
        for base in _added(module):
            for function in [*_parts(vars(base).get(name)), *_parts(_beside(base, name))]:
                yield function
                for code in _nested(function.__code__):
                    names += [each for each in code.co_names if each not in seen]
                    seen.update(code.co_names)


def _beside(base: type, name: str) -> Any:
    """Return the function of a name in the file of a class; None if there is none."""
    found = vars(sys.modules.get(base.__module__, types)).get(name)
    return found if getattr(found, "__module__", "") == base.__module__ else None


def _codes(module: nn.Module, method: str) -> Iterator[types.CodeType]:
    for function in _functions(module, method):
        yield from _nested(function.__code__)


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _nested(each)


def _parts(member: Any) -> list[types.FunctionType]:
    """Return the functions of a member of a class."""
    found: list[Callable[..., Any] | None] = [getattr(member, "__func__", member)]
    if isinstance(member, property):
        found = [member.fget, member.fset]
    while found and hasattr(found[-1], "__wrapped__"):
        found.append(found[-1].__wrapped__)  # type: ignore[union-attr]
    return [each for each in found if isinstance(each, types.FunctionType)]


def _is_data(module: nn.Module, name: str) -> bool:
    """Return whether a name is an attribute of the class, which may be changed or assigned."""
    members = [vars(base)[name] for base in _added(module) if name in vars(base)]
    return name not in DESCRIBING and any(not _parts(member) for member in members)


def _texts(constants: Iterable[object]) -> set[str]:
    found: set[str] = set()
    for each in constants:
        found |= {each} if isinstance(each, str) else _texts(each) if isinstance(each, tuple | frozenset) else set()
    return found


def _changeable(function: types.FunctionType) -> list[str]:
    """Return the global names, and those of functions around, whose values may change what a function does."""
    values = {name: function.__globals__.get(name) for code in _nested(function.__code__) for name in code.co_names}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    values |= {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
    return sorted(name for name, value in values.items() if isinstance(value, bool) or not _is_constant(value))


def _is_constant(value: Any) -> bool:
    simple = (int, float, str, tuple, types.ModuleType, torch.dtype, type(None))
    return isinstance(value, simple) or callable(value)


def _stored(code: types.CodeType) -> Iterator[str]:
    return (str(each.argval) for each in dis.get_instructions(code) if each.opname in ("STORE_ATTR", "DELETE_ATTR"))
