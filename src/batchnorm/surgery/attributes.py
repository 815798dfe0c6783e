"""The attributes of modules, remembered while their code runs, and put back at the end."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

__all__ = ["Attributes"]

CONTAINERS = (dict, OrderedDict, list, set)
"""Attributes of these types, among them buffers, hooks and caches, are put back with the content that they had."""


class Attributes:
    """The attributes of a module and of all below it, as they are when this is made."""

    def __init__(self, module: nn.Module) -> None:
        self._of = {each: _copied(vars(each)) for each in module.modules()}

    def changed(self, module: nn.Module) -> list[Any]:
        """Return the values that have been set on a module, or put into a container that it had; modes are left out."""
        before, found = self._of[module], list[Any]()
        for name, value in vars(module).items():
            old, content = before.get(name, (None, None))
            if name != "training" and (name not in before or old is not value):
                found.append(value)
            elif content is not None:
                known = _items(content)
                found += [item for item in _items(value) if not any(item is other for other in known)]
        return found

    def restore(self) -> None:
        """Set everything as it was."""
        for module, attributes in self._of.items():
            vars(module).clear()
            for name, (value, content) in attributes.items():
                if content is not None:
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(content)
                vars(module)[name] = value


def _copied(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return each attribute with a copy of its content, which is None where it has none."""
    return {name: (value, value.copy() if type(value) in CONTAINERS else None) for name, value in attributes.items()}


def _items(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)
