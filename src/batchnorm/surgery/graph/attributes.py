"""The attributes of modules, remembered while their code runs on symbols, which it may keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from batchnorm.surgery.graph.blocks import Mode

__all__ = ["Attributes", "in_mode"]


class Attributes:
    """The attributes of a module and of all below it, and the content of those that are lists and dictionaries."""

    def __init__(self, module: nn.Module) -> None:
        self._of = {each: _copied(vars(each)) for each in module.modules()}

    def changed(self, module: nn.Module) -> list[Any]:
        """Return the values that have been set on a module, or put into a list or dictionary that it had."""
        before, now = self._of[module], _copied(vars(module))
        found: list[Any] = []
        for name, (value, content) in now.items():
            if name == "training":
                continue
            _, old = before.get(name, (None, None))
            if content is None:
                if name not in before or before[name][0] is not value:
                    found.append(value)
            else:
                items, known = (list(c.values()) if isinstance(c, dict) else c or [] for c in (content, old))
                found += [item for item in items if not any(item is other for other in known)]
        return found

    def restore(self) -> None:
        """Set everything as it was."""
        for module, attributes in self._of.items():
            vars(module).clear()
            for name, (value, content) in attributes.items():
                if isinstance(value, dict) and content is not None:
                    value.clear()
                    value.update(content)
                elif content is not None:
                    value[:] = content
                vars(module)[name] = value


def _copied(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return each attribute with a copy of its content, which is None where it has none."""
    return {
        name: (value, dict(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else None)
        for name, value in attributes.items()
    }


@contextmanager
def in_mode(module: nn.Module, mode: Mode) -> Iterator[Attributes]:
    """Set the flags of a mode on a module and all below it, without ``train()``; restore all attributes at the end."""
    attributes = Attributes(module)
    try:
        for each in module.modules():
            vars(each)["training"] = mode == "train"
        yield attributes
    finally:
        attributes.restore()
