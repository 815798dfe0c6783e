"""The report of surgery: the layers that were replaced, and the options of training that were lost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from batchnorm.reports import Block, Entries, Report, Table
from batchnorm.statistics.changes import layer_name

__all__ = ["Replacement", "Surgery"]

MOST_PATHS = 3
"""Where more layers lack the same option, the report counts them."""


@dataclass(frozen=True)
class Replacement:
    """A layer that was replaced.

    Attributes
    ----------
    path : str
        Module path of the layer.
    before, after : str
        The classes of the layer, and of the modules in its place, which run one after the other.
    lost : tuple of str
        The options and state, as "name=value", that made a difference in training and have gone.
    """

    path: str
    before: str
    after: str
    lost: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Surgery(Report):
    """The result of surgery on a model.

    Attributes
    ----------
    layers : tuple of Replacement
        In the order of the modules.
    """

    layers: tuple[Replacement, ...]

    def _summary(self) -> str:
        return f"{_count(len(self.layers))} replaced"

    def _blocks(self) -> Iterable[Block]:
        if not self.layers:
            yield "The model has no layers of batchnorm's, and stays as it is."
            return
        yield Table(
            ["layer", "before", "after"],
            [
                [layer_name(layer.path) for layer in self.layers],
                [layer.before for layer in self.layers],
                [layer.after for layer in self.layers],
            ],
        )
        paths: dict[str, list[str]] = {}
        for layer in self.layers:
            for option in layer.lost:
                paths.setdefault(option.partition("=")[0], []).append(layer_name(layer.path))
        if paths:
            yield ""
            yield "Lost in training:"
            yield Entries([(option, self._where(found)) for option, found in paths.items()])

    def _where(self, paths: list[str]) -> str:
        if len(paths) == len(self.layers) > 1:
            return f"all {len(paths)} layers"
        return ", ".join(paths) if len(paths) <= MOST_PATHS else f"{_count(len(paths))}, the first at {paths[0]}"

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"layer": layer.path, "before": layer.before, "after": layer.after, "lost": ", ".join(layer.lost)}
            for layer in self.layers
        ]


def _count(layers: int) -> str:
    return f"{layers} {'layer' if layers == 1 else 'layers'}"
