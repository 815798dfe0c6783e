"""Layers as torch's tools read them: by the attributes of torch's formula, which has none of our options.

Functions that fuse, freeze or replace a layer take it for torch's, because it is an instance of torch's class, and read
``running_mean``, ``weight`` and the like. All of them read ``eps``, and little else does.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from types import CodeType
from typing import Any

import torch

from batchnorm.errors import UnsupportedError, warn
from batchnorm.nn.options import Options
from batchnorm.nn.state import State

__all__ = ["AT_INFERENCE", "Readable", "lost_in_training", "options_at_inference"]

AT_INFERENCE = ("activation", "channel_dim")
"""The options that change what a layer computes at inference."""

TOOL_SIGNS = ({"running_var"}, {"affine", "track_running_stats"}, {"momentum", "num_features"})
"""A function that uses all names of one of these sets beside eps computes torch's formula, or builds torch's layer.

One that uses ``momentum`` builds a layer that trains.
"""


class Readable(State):
    """A layer that stops, by its attribute ``eps``, the tools that would compute something else than the layer."""

    @property
    def eps(self) -> float:
        """The number added to the variance.

        Raises
        ------
        UnsupportedError
            The function that asks for it takes the layer for torch's, and an option makes torch's formula wrong.
        """
        if not torch.compiler.is_compiling():  # a graph sees no frames, so a compiled function gets the number
            frame = sys._getframe(1)
            if frame.f_locals.get("self") is not self:  # a method of a subclass knows the options
                self._answer(frame.f_code.co_name, _words(frame.f_code))
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        # Torch's extra_repr looks into __dict__; torch.compile may find this property there instead of the number.
        self.__dict__["eps"] = self.__dict__["_eps"] = value

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "eps" in self.__dict__:  # older versions kept it under this name alone
            self.__dict__.setdefault("_eps", self.__dict__["eps"])

    def _answer(self, reader: str, names: set[str]) -> None:
        """Stop a function by the names that it uses, or warn of it.

        An option whose name or value is among the names, as in ``F.relu(...)``, is one that the function knows.
        """
        if not any(names >= sign for sign in TOOL_SIGNS):
            return
        kind = f"{type(self).__name__}({self.num_features})"
        options = [
            option
            for option in options_at_inference(self)
            if option.partition("=")[0] not in names and option.partition("=")[2].strip("'") not in names
        ]
        if options:
            raise UnsupportedError(
                f"{reader} takes {kind} for torch's layer, which lacks some of its options; got {', '.join(options)}. "
                "Give it the model that batchnorm.to_torch(model) returns; the number alone is vars(layer)['eps']"
            )
        if "momentum" not in names:
            return
        lost = [option for option in lost_in_training(self) if option.partition("=")[0] not in (*names, "nonfinite")]
        if lost:
            warn(
                f"{reader} copies the settings of {kind} to a layer that lacks {', '.join(lost)} and trains otherwise; "
                "batchnorm.to_torch(model) reports what is lost"
            )


def _words(code: CodeType) -> set[str]:
    """Return the names that a function uses: of attributes, variables and keyword arguments, and its texts."""
    words = {*code.co_names, *code.co_varnames, *code.co_freevars}
    for constant in code.co_consts:
        words.update(word for word in (constant if isinstance(constant, tuple) else (constant,)) if type(word) is str)
    return words


def options_at_inference(layer: State) -> list[str]:
    """Return the options of a layer that change inference and that torch's layers lack, as "name=value"."""
    settings = {name: getattr(layer, name) for name in AT_INFERENCE}
    return [f"{name}={value!r}" for name, value in settings.items() if value != getattr(Options, name)]


def lost_in_training(layer: State) -> list[str]:
    """Return the options and state of a layer that change its training and that torch's layers lack."""
    names = [field.name for field in fields(Options) if field.name not in (*AT_INFERENCE, "nonfinite", "process_group")]
    lost = [f"{name}={value!r}" for name in names if (value := getattr(layer, name)) != getattr(Options, name)]
    if layer.frozen_statistics:
        lost.append("frozen_statistics=True")
    if layer.domain_names:
        lost.append(f"domains={layer.domain_names!r}")
    if layer.nonfinite == "skip":
        lost.append("nonfinite='skip'")
    return lost
