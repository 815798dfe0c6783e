"""Conversion of dataclasses to and from the plain values that JSON holds, guided by their type hints.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Point:
...     name: str
...     at: tuple[float, float]
>>> to_json(Point("p", (0.5, math.inf)))
{'name': 'p', 'at': [0.5, 'inf']}
>>> from_json(Point, {"name": "p", "at": [0.5, "inf"]})
Point(name='p', at=(0.5, inf))
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

__all__ = ["from_json", "to_json"]

T = TypeVar("T")
Reader = Callable[[Any], Any]

NOT_FINITE = {None: math.nan, "inf": math.inf, "-inf": -math.inf}


def to_json(value: Any) -> Any:
    """Return the value with dataclasses as dictionaries, tuples as lists, and numbers that JSON lacks replaced.

    NaN becomes None, and infinities become "inf" and "-inf". A class with a method ``to_json`` is converted by it.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if hasattr(value, "to_json"):
        return to_json(value.to_json())
    if dataclasses.is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def from_json(kind: type[T], value: Any) -> T:
    """Return the value of this type that `to_json` was given.

    ``kind`` is a dataclass, or any type hint of lists, tuples, dictionaries, unions with None, and dataclasses. A
    field that is missing takes its default.

    Raises
    ------
    ValueError, TypeError
        The value does not fit the type.
    """
    return cast("T", _reader(cast("Any", kind))(value))


@functools.cache
def _reader(kind: Any) -> Reader:
    """Return the function that converts a JSON value to a type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _union(kind, arguments)
    if kind is float:
        return _number
    if origin is list:
        item = _reader(arguments[0])
        return lambda values: [item(value) for value in _of_type(values, list)]
    if origin is tuple:
        return _tuple(arguments)
    if origin is dict:
        item = _reader(arguments[1])
        return lambda values: {key: item(value) for key, value in _of_type(values, dict).items()}
    if dataclasses.is_dataclass(kind):
        return functools.partial(_record, kind)
    if origin is Literal:
        return functools.partial(_one_of, arguments)
    if kind is Any:
        return lambda value: value
    return functools.partial(_of_type, kind=kind)


def _of_type(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a value must be of type {getattr(kind, '__name__', kind)}; got {value!r:.40}")
    return value


def _one_of(choices: tuple[Any, ...], value: Any) -> Any:
    if value not in choices:
        raise ValueError(f"a value must be one of {', '.join(map(repr, choices))}; got {value!r:.40}")
    return value


def _number(value: Any) -> float:
    if type(value) is float or type(value) is int:
        return value
    if value is not None and not isinstance(value, str):
        raise TypeError(f"a value must be a number; got {value!r:.40}")
    return NOT_FINITE[_one_of(tuple(NOT_FINITE), value)]


def _union(kind: Any, kinds: tuple[Any, ...]) -> Reader:
    """Return the reader of a type or None, or of several types that JSON has."""
    given = [one for one in kinds if one is not types.NoneType]
    if len(given) > 1:
        return functools.partial(_of_type, kind=kind)
    reader = _reader(given[0])
    return lambda value: None if value is None else reader(value)


def _tuple(kinds: tuple[Any, ...]) -> Reader:
    if kinds[-1] is Ellipsis:
        item = _reader(kinds[0])
        return lambda values: tuple(item(value) for value in _of_type(values, list))
    readers = [_reader(kind) for kind in kinds]
    return lambda values: tuple(reader(value) for reader, value in zip(readers, _of_type(values, list), strict=True))


def _record(kind: Any, values: Any) -> Any:
    """Return a dataclass made from a dictionary of its fields; one that is made already is left as it is."""
    if isinstance(values, kind):
        return values
    readers = _field_readers(kind)
    unknown = [name for name in _of_type(values, dict) if name not in readers]
    if unknown:
        raise ValueError(f"{kind.__name__} must have fields of {', '.join(readers)}; got {unknown[0]!r}")
    return kind(**{name: readers[name](value) for name, value in values.items()})


@functools.cache
def _field_readers(kind: Any) -> dict[str, Reader]:
    hints = get_type_hints(kind)
    return {field.name: _reader(hints[field.name]) for field in dataclasses.fields(kind)}
