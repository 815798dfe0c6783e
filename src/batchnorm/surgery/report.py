"""The report of surgery: the layers that were changed, those that were left alone, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from batchnorm.reports import Block, Entries, Report, Table
from batchnorm.statistics.changes import layer_name

__all__ = ["Left", "Replacement", "Surgery"]

MOST_ROWS = 12
"""Where more layers were changed, a row of the table stands for all that were changed alike."""

MOST_PATHS = 3
"""Where more layers have something in common, the report counts the rest."""

WIDTH = 80
"""Columns of text of a report."""

WIDEST = 26
"""Longer texts are cut in the second column of the table, and in the third where there is no room."""


@dataclass(frozen=True)
class Replacement:
    """A layer that was changed.

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
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class Left:
    """A layer that was left alone.

    Attributes
    ----------
    path : str
        Module path of the layer.
    kind : str
        Its class.
    reason : str
        The reason, a clause without a full stop.
    """

    path: str
    kind: str
    reason: str


@dataclass(frozen=True, repr=False)
class Surgery(Report):
    """The result of surgery on a model. Each of its batch normalization layers is in ``layers`` or in ``left``.

    Attributes
    ----------
    layers : tuple of Replacement
        The layers that were changed, in the order of the modules.
    left : tuple of Left
        The layers that were left alone.
    max_difference : float or None
        The largest absolute difference of the outputs on the example, in eval mode; None without an example.
    notes : tuple of str
        Sentences about what is to be done or known now.
    """

    layers: tuple[Replacement, ...]
    left: tuple[Left, ...] = ()
    max_difference: float | None = None
    notes: tuple[str, ...] = ()

    def _summary(self) -> str:
        left = f", {len(self.left)} left alone" if self.left else ""
        difference = "" if self.max_difference is None else f", largest difference {self.max_difference:.2g}"
        return f"{_count(len(self.layers))} changed{left}{difference}"

    def _blocks(self) -> Iterable[Block]:
        blocks = (self._changed(), self._lost(), self._left(), self._difference(), iter(self.notes))
        shown = [part for block in blocks if (part := [*block])]
        for i, part in enumerate(shown):
            if i:
                yield ""
            yield from part

    def _changed(self) -> Iterable[Block]:
        if not self.layers:
            yield "No layer was changed."
            return
        alike: dict[tuple[str, str], list[str]] = {}
        for layer in self.layers:
            alike.setdefault((layer.before, layer.after), []).append(layer.path)
        rows = [(layer_name(layer.path), layer.before, layer.after) for layer in self.layers]
        if len(rows) > MOST_ROWS:
            rows = [(_first_and_count(paths), *kinds) for kinds, paths in alike.items()]
        names, before, after = (list(column) for column in zip(*rows, strict=True))
        room = WIDTH - 6 - max(map(len, names)) - min(max(map(len, before)), WIDEST)
        cut = [_cut(text, max(room, WIDEST)) for text in after]
        yield Table(["layer", "before", "after"], [names, [_cut(text, WIDEST) for text in before], cut])

    def _lost(self) -> Iterable[Block]:
        paths: dict[str, list[str]] = {}
        for layer in self.layers:
            for option in layer.lost:
                paths.setdefault(option.partition("=")[0], []).append(layer.path)
        if paths:
            yield "Lost in training:"
            yield Entries([(option, self._where(found)) for option, found in paths.items()])

    def _left(self) -> Iterable[Block]:
        paths: dict[tuple[str, str], list[str]] = {}
        for layer in self.left:
            paths.setdefault((layer.kind, layer.reason), []).append(layer.path)
        if paths:
            yield "Left alone:"
            yield from (f"- {kind} at {_listed(found)}: {reason}" for (kind, reason), found in paths.items())

    def _difference(self) -> Iterable[Block]:
        if self.max_difference is not None:
            yield f"Largest difference of the outputs on the example: {self.max_difference:.2g}"

    def _where(self, paths: list[str]) -> str:
        return f"all {len(paths)} layers" if len(paths) == len(self.layers) > 1 else _listed(paths)

    def _records(self) -> list[dict[str, Any]]:
        changed = [(layer.path, layer.before, layer.after, ", ".join(layer.lost), "") for layer in self.layers]
        left = [(layer.path, layer.kind, layer.kind, "", layer.reason) for layer in self.left]
        columns = ("layer", "before", "after", "lost", "left_because")
        return [dict(zip(columns, row, strict=True)) for row in changed + left]


def _listed(paths: Sequence[str]) -> str:
    """Return the first paths, and how many more there are."""
    first = ", ".join(layer_name(path) for path in paths[:MOST_PATHS])
    more = len(paths) - MOST_PATHS
    return first if more <= 0 else f"{first} and {more} more"


def _first_and_count(paths: Sequence[str]) -> str:
    first = layer_name(paths[0])
    return first if len(paths) == 1 else f"{first} and {len(paths) - 1} more"


def _cut(text: str, width: int) -> str:
    """Cut a text in its middle: the end of a list of classes or of a path tells as much as the beginning."""
    half = (width - 3) // 2
    return text if len(text) <= width else f"{text[: width - 3 - half]}...{text[-half:]}"


def _count(layers: int) -> str:
    return f"{layers} {'layer' if layers == 1 else 'layers'}"
