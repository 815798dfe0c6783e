"""Layers of ours whose child modules run behind the normalization, as those of timm: dropout and an activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from batchnorm.nn.layer import Layer
from batchnorm.surgery.derived import derive

__all__ = ["children_behind", "run_children"]


@dataclass(frozen=True)
class _RunChildren:
    """The change of a class of ours whose forward ends with child modules."""

    names: tuple[str, ...]

    def __call__(self, base: type[nn.Module]) -> Mapping[str, Any]:
        normalize: Callable[..., Tensor] = base.forward

        def forward(
            self: Any,
            input: Tensor,  # noqa: A002 (torch's name for it)
            residual: Tensor | None = None,
            mask: Tensor | None = None,
        ) -> Tensor:
            """Return the output of the layer after its child modules."""
            y = normalize(self, input, residual, mask)
            for name in type(self).children_behind:
                y = self._modules[name](y)
            return y

        return {"forward": forward, "children_behind": self.names}


def run_children(layer: Layer, names: tuple[str, ...]) -> None:
    """Let the children of these names run one after the other behind the layer."""
    if names:
        derive(layer, _RunChildren(names))


def children_behind(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the children that run behind a layer of ours."""
    return getattr(type(layer), "children_behind", ())
