"""The comparison of networks with and without batch normalization, from Python.

>>> import batchnorm as bn
>>> sorted(bn.lab.__all__)
['Comparison', 'compare', 'study']
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchnorm.lab.notebook import Comparison, compare, study

__all__ = ["Comparison", "compare", "study"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("batchnorm.lab.notebook"), name)
