"""Trained models, imported by name, and how rows of a table become their inputs."""

from __future__ import annotations

import importlib
import operator
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from batchnorm.errors import InputError, MissingDependencyError

__all__ = ["Served", "load"]


@dataclass(frozen=True)
class Served:
    """A trained model, and how rows of a table become its input.

    Attributes
    ----------
    model : Module
        The model, in eval mode.
    to_input : callable
        Turns rows (N, features) of float64 into the model's input.
    estimator : estimator or None
        The scikit-learn estimator that the model belongs to.
    """

    model: nn.Module
    to_input: Callable[[NDArray[np.float64]], Tensor]
    estimator: Any


def load(model: str, weights: Path | None = None) -> Served:
    """Import a trained model.

    Parameters
    ----------
    model : str
        ``module:name`` of a Module, of a fitted estimator of this library, of a scikit-learn pipeline that ends in one,
        or of a function that returns one of these. The working directory is searched first.
    weights : path or None
        A state dict to load strictly: a file of ``torch.save``, or safetensors.

    Raises
    ------
    InputError
        There is no such module or name, it is not a model or raises, or the weights don't fit.
    MissingDependencyError
        The weights are safetensors, and safetensors is not installed.
    """
    found = _imported(model)
    if isinstance(found, nn.Module):
        if weights is not None:
            _load_weights(found, weights)
        dtype = next((p.dtype for p in found.parameters() if p.is_floating_point()), torch.float32)
        return Served(found.eval(), lambda rows: torch.as_tensor(rows, dtype=dtype), None)
    steps = getattr(found, "steps", None)
    before, last = (found[:-1], found[-1]) if steps and len(steps) > 1 else (None, steps[0][1] if steps else found)
    network = getattr(last, "network_", None)
    if not isinstance(network, nn.Module):
        raise InputError(
            f"model must name a torch Module or a fitted batchnorm estimator, or a function that returns one; "
            f"{model!r} is {type(found).__name__}"
        )
    if weights is not None:
        raise InputError(f"weights are for a torch Module; {model!r} is a fitted {type(last).__name__}")
    dtype = next(network.parameters()).dtype

    def to_input(rows: NDArray[np.float64]) -> Tensor:
        return torch.as_tensor(np.asarray(rows if before is None else before.transform(rows)), dtype=dtype)

    return Served(network.eval(), to_input, found)


def _imported(model: str) -> Any:
    module_name, colon, attribute = model.partition(":")
    if not (module_name and colon and attribute):
        raise InputError(f"model must be MODULE:NAME, as in train:make_model; got {model!r}")
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 (sys.path holds strings)
    try:
        found: Any = operator.attrgetter(attribute)(importlib.import_module(module_name))
        return found() if callable(found) and not isinstance(found, nn.Module) else found
    except Exception as error:  # importing and calling code of the user can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"model must name a model, or a function without arguments; {model!r} gives {reason}"
        ) from error
    finally:
        sys.path.pop(0)


def _load_weights(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise InputError(f"weights must name a file; there is none at {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except ImportError as error:
        raise MissingDependencyError("weights in safetensors need pip install 'batchnorm[snapshot]'") from error
    except Exception as error:  # unpickling can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"weights must hold a state dict of the model; {str(path)!r} gives {reason}") from error
