"""The state of a layer: its options, running statistics and frozen flags, through casts, copies and state dicts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, is_lazy

from batchnorm.checks import Activation
from batchnorm.errors import InputError
from batchnorm.nn.buffers import COUNTS, context_of, is_narrow
from batchnorm.nn.filling import STATISTICS, filling, is_filling
from batchnorm.nn.options import Nonfinite, Options, SmallBatch, checked_options
from batchnorm.nn.renorm import Renorm, RenormSchedule
from batchnorm.nn.running import RunningBuffers
from batchnorm.nn.step_state import StepState
from batchnorm.nn.sync import SharedGroup

__all__ = ["State"]

OPTIONS = tuple(field.name for field in fields(Options))
SETTINGS = {*OPTIONS, "eps", "momentum", "training", "track_running_stats"}
INITIAL = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
"""The values of a new layer."""


def _is_on_meta(values: Tensor | None) -> bool:
    return values is not None and values.is_meta and not is_lazy(values)


def _constant(values: Tensor | None) -> Tensor | None:
    """Return the values without a gradient, even after ``model.requires_grad_(True)``."""
    return values.detach() if values is not None and values.requires_grad else values


class State(RunningBuffers):
    """Torch's parameters and running statistics, our options, and the state of the current step."""

    activation: Activation | None
    small_batch: SmallBatch
    nonfinite: Nonfinite
    virtual_batch_size: int | None
    renorm: Renorm | RenormSchedule | None
    sync: bool
    process_group: Any
    channel_dim: int
    unbiased: bool
    frozen_affine: bool = False

    def adopt(self, options: Options, device: torch.device | str | None) -> None:
        """Set the attributes and buffers that torch's layers do not have."""
        self.__dict__.update({name: getattr(options, name) for name in OPTIONS})
        self.frozen_statistics = self.frozen_affine = False
        self._untrained: list[str] = []  # the parameters that had no gradient before they were frozen
        self.step_state = StepState()
        self.register_counts()
        for name, buffer in self._buffers.items():
            if buffer is not None and is_narrow(buffer):
                if isinstance(buffer, UninitializedBuffer):
                    self._buffers[name] = UninitializedBuffer(device=device, dtype=torch.float32)  # type: ignore[call-arg]
                else:
                    self._buffers[name] = buffer.to(torch.float32)
        self.remember_values()

    def __setattr__(self, name: str, value: Any) -> None:
        """Check an option as the constructor does, and drop all plans where an attribute changes."""
        if name in OPTIONS:
            options = replace(self.options(), **{name: value})
            value = getattr(checked_options(options, track_running_stats=self.track_running_stats), name)
        changes = name not in self.__dict__ or self.__dict__[name] is not value  # train() sets the mode at each step
        set_name = self.name_to_set(name) if name.startswith(STATISTICS) else name
        if set_name is None:
            return
        super().__setattr__(set_name, value)
        if changes and "step_state" in self.__dict__:
            self.step_state.drop_plans()
        if name == "nonfinite":
            self._buffers["skipped_batches"] = None
            self.begin_counts()

    def __getattr__(self, name: str) -> Any:
        """Return the running statistics that a forward in this thread would use; torch's lookup knows the stored."""
        if name in STATISTICS and "step_state" in self.__dict__ and name in self._buffers:
            value: Any = self.statistics_in(context_of(self))[STATISTICS.index(name)]
        else:
            value = super().__getattr__(name)
        if value is None and name.startswith(COUNTS) and name in self.count_names():
            self.begin_counts()
            return self._buffers[name]
        if (
            name.startswith("num_batches_tracked")
            and value is not None
            and self.frozen_statistics
            and name in self.statistics_names()
        ):
            return value.clone()  # ``layer.num_batches_tracked *= 0`` changes it before it sets it
        return value

    def options(self) -> Options:
        """Return the options that torch's layers do not have."""
        return Options(**{name: getattr(self, name) for name in OPTIONS})

    def set_options(self, options: Options) -> None:
        """Set all options together, since some need or exclude others.

        Raises
        ------
        InputError
            One is out of its range, or does not go with another; none is set.
        """
        checked = checked_options(options, track_running_stats=self.track_running_stats)
        counts_anew = checked.nonfinite != self.nonfinite
        self.__dict__.update({name: getattr(checked, name) for name in OPTIONS})
        self.step_state.drop_plans()
        if counts_anew:
            self._buffers["skipped_batches"] = None
            self.begin_counts()

    def trains(self) -> bool:
        """Return whether forward uses batch statistics because the layer is in training mode, and not frozen."""
        return self.training and not self.frozen_statistics

    def may_plan(self) -> bool:
        """Return whether all settings are attributes; a subclass that computes one does not tell when it changes."""
        return self.__dict__.keys() >= SETTINGS

    def weight_and_bias(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the parameters, or the tensors by which pruning, parametrizations and the like replace them."""
        parameters = self._parameters  # without the search that an attribute of a module takes
        if "weight" in parameters and "bias" in parameters:
            weight, bias = parameters["weight"], parameters["bias"]
        else:
            weight, bias = self.weight, self.bias
        return (_constant(weight), _constant(bias)) if self.frozen_affine else (weight, bias)

    # Freezing.

    def freeze(self, *, statistics: bool = True, affine: bool = False) -> None:
        """Normalize with the running statistics and stop updating them; with ``affine`` keep gamma and beta too.

        The layer stays frozen through ``train()``, copies, and state dicts.
        """
        if statistics and not self.frozen_statistics:
            if self._buffers["running_mean"] is None:
                raise InputError("a layer must keep running statistics to freeze them; got track_running_stats=False")
            self.frozen_statistics = True
        if affine and not self.frozen_affine:
            self.frozen_affine = True
            parameters = dict(self.named_parameters())  # those of parametrizations too
            self._untrained = [name for name, parameter in parameters.items() if not parameter.requires_grad]
            for parameter in parameters.values():
                parameter.requires_grad = False  # requires_grad_() would fail on a lazy layer
                parameter.grad = None  # or an optimizer would still use it

    def unfreeze(self, *, statistics: bool = True, affine: bool = True) -> None:
        """Undo `freeze`."""
        if statistics:
            self.frozen_statistics = False
        if affine and self.frozen_affine:
            self.frozen_affine = False
            for name, parameter in self.named_parameters():
                parameter.requires_grad = name not in self._untrained

    def reset_parameters(self) -> None:
        """Do as torch's layers, but leave what is frozen as it is, and the running statistics of other domains."""
        if self.frozen_affine and not is_filling():
            self.reset_running_stats()
            self.warn_of_frozen("reset_parameters()", "gamma and beta")
        else:
            super().reset_parameters()

    # Running statistics keep their precision, and memory that was never filled is not used.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> State:
        """Apply fn as torch's modules do, but exempt running statistics from a cast to fewer than 32 bits.

        ``to_empty`` leaves noise, and a `reset_parameters` after it leaves that where it is frozen. So frozen
        statistics and counts keep their values, and what comes from the meta device has those of a new layer.
        """
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None and not is_lazy(buffer)}
        on_meta = {name for name, values in (*self._parameters.items(), *before.items()) if _is_on_meta(values)}
        kept = {*self.count_names(), *(self.statistics_names() if self.frozen_statistics else ())}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            assert new is not None
            if is_narrow(new) and not is_narrow(old):
                self._buffers[name] = old.to(new.device)
            elif new is not old and name in kept and not (old.is_meta or new.is_meta):
                new.copy_(old)
        if on_meta:
            self._fill(on_meta)
        self.drop_counts()
        self.begin_counts()
        self.remember_values()
        return self

    @torch.no_grad()
    def _fill(self, names: Collection[str]) -> None:
        """Give the parameters and buffers of these names the values of a new layer, unless they are on meta."""
        for suffix in ("", *(f"_{domain}" for domain in self.domain_names)):
            for kind, initial in INITIAL.items():
                values = (self._parameters | self._buffers).get(kind + suffix)
                if kind + suffix in names and values is not None and not values.is_meta:
                    values.fill_(initial)

    # The frozen flags travel in the metadata of the state dict, which torch's layers ignore.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {})
        if prefix[:-1] in metadata:
            metadata[prefix[:-1]]["frozen"] = [
                name for name in ("statistics", "affine") if getattr(self, f"frozen_{name}")
            ]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        if "num_batches_tracked" in self._non_persistent_buffers_set:
            local_metadata = local_metadata | {"version": 2}  # or torch would add the key, and then not expect it
        self.step_state.memory = {}  # torch.utils.swap_tensors refuses buffers that have weak references
        with filling():
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)
        for name, buffer in self._buffers.items():  # with assign=True they are the tensors of the state dict
            if buffer is not None and is_narrow(buffer):
                self._buffers[name] = buffer.float()
        self.begin_counts()
        self.remember_values()
        if "frozen" in local_metadata:
            frozen = local_metadata["frozen"]
            self.freeze(statistics="statistics" in frozen, affine="affine" in frozen)
            self.unfreeze(statistics="statistics" not in frozen, affine="affine" not in frozen)

    # Copies and pickles.

    def __getstate__(self) -> dict[str, Any]:
        group = None if self.process_group is None else SharedGroup(self.process_group)
        self.begin_counts()  # or the copy would have other buffers once one of both has begun them
        return self.__dict__ | {"process_group": group, "step_state": self.step_state.fresh()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        shared = state["process_group"]
        super().__setstate__(state | {"process_group": None if shared is None else shared.group})  # type: ignore[no-untyped-call]
        self.step_state = self.step_state.fresh()  # its key is that of another layer, where a file is loaded twice
        self._buffers.setdefault("skipped_batches")  # older versions had fewer counts, and had them on meta too
        self._buffers.setdefault("samples_seen")
        self.drop_counts()
        self.remember_values()
