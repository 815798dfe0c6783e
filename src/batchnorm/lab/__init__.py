"""The comparison of networks with and without batch normalization, from Python.

>>> import batchnorm as bn
>>> sorted(bn.lab.__all__)
['Comparison', 'compare', 'study']
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from batchnorm.extras import are_installed, needs

if TYPE_CHECKING:
    from batchnorm.lab.notebook import Comparison, compare, study

__all__ = ["Comparison", "compare", "study"]


class _Package(ModuleType):
    """Type of this module, which offers its names where the packages of the extra lab are installed."""

    @property
    def __all__(self) -> list[str]:
        return __dir__()


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs(f"batchnorm.lab.{name}"):
        return getattr(importlib.import_module("batchnorm.lab.notebook"), name)


def __dir__() -> list[str]:
    return __all__ if are_installed("jinja2", "joblib", "plotly", "polars", "rich", "scipy", "sklearn") else []
