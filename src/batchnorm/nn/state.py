"""What a layer keeps: running statistics and their precision, what is frozen, through casts, copies and state dicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer

from batchnorm.checks import Activation
from batchnorm.errors import InputError
from batchnorm.kernels.plan import Plan
from batchnorm.nn.accumulated import Pool
from batchnorm.nn.options import Nonfinite, Options, SmallBatch, checked_options
from batchnorm.nn.renorm import FirstRuns, Renorm, RenormSchedule
from batchnorm.nn.running import COUNTS, RunningBuffers
from batchnorm.nn.sync import Shared

__all__ = ["State"]

SETTINGS = {*(field.name for field in fields(Options)), "eps", "momentum", "training", "track_running_stats"}


def _is_narrow(values: Tensor) -> bool:
    """Whether the values are of a dtype in which running statistics would stop moving."""
    return values.is_floating_point() and values.dtype.itemsize < 4


def _constant(values: Tensor | None) -> Tensor | None:
    """The values without a gradient, which a model's requires_grad_(True) would ask for again."""
    return values.detach() if values is not None and values.requires_grad else values


class State(RunningBuffers):
    """Torch's parameters and running statistics, and beside them our options and what belongs to the step at hand."""

    activation: Activation | None
    small_batch: SmallBatch
    nonfinite: Nonfinite
    virtual_batch_size: int | None
    renorm: Renorm | RenormSchedule | None
    sync: bool
    process_group: Any
    channel_dim: int
    unbiased: bool
    _plans: dict[torch.Size, list[Plan]]  # of forwards, by the input's shape

    def _take(self, options: Options, device: torch.device | str | None) -> None:
        """Set what our layers have beside torch's attributes."""
        self.__dict__.update({field.name: getattr(options, field.name) for field in fields(Options)})
        self.frozen_statistics = self.frozen_affine = False
        self._untrained: list[str] = []  # what took no gradient before it was frozen
        self.active_domain: str | None = None
        self._held = False  # whether no_stat_updates holds the running statistics
        self._pool: Pool | None = None
        self._first_runs = FirstRuns()
        self._warned_of_one_sample = False
        self._agreed = False  # whether all ranks were seen at this layer together
        self.register_counts(device)
        for name, buffer in self._buffers.items():
            if buffer is not None and _is_narrow(buffer):
                kept = torch.float32
                if isinstance(buffer, UninitializedBuffer):
                    self._buffers[name] = UninitializedBuffer(device=device, dtype=kept)  # type: ignore[call-arg]
                else:
                    self._buffers[name] = buffer.to(kept)

    def __setattr__(self, name: str, value: Any) -> None:
        """Check an option that is set on a layer that has been built as if it were built so, and forget all plans."""
        if name in Options.__dataclass_fields__:
            options = Options(**{option: getattr(self, option) for option in Options.__dataclass_fields__})
            options = checked_options(replace(options, **{name: value}), track_running_stats=self.track_running_stats)
            value = getattr(options, name)
        same = name in self.__dict__ and self.__dict__[name] is value  # as where train() is called at each step
        super().__setattr__(name, value)
        if not same:
            self.__dict__["_plans"] = {}  # a new one: a forward on another thread may be about to add to the old
        if name == "nonfinite":
            self.skipped_batches = self.new_skipped_batches(
                None if self.running_mean is None else self.running_mean.device
            )

    def may_plan(self) -> bool:
        """Whether what the layer is set to is its own to know: a subclass may compute it, and tell of no change."""
        return self.__dict__.keys() >= SETTINGS

    def weight_and_bias(self) -> tuple[Tensor | None, Tensor | None]:
        """Parameters, or what pruning, parametrizations and the like have put in their place."""
        parameters = self._parameters  # without the search that an attribute of a module takes
        if "weight" in parameters and "bias" in parameters:
            weight, bias = parameters["weight"], parameters["bias"]
        else:
            weight, bias = self.weight, self.bias
        return (_constant(weight), _constant(bias)) if self.frozen_affine else (weight, bias)

    # Statistics keep their precision.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> State:
        """Apply fn as torch's modules do, but leave running statistics out of a cast to fewer than 32 bits."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            assert new is not None
            if _is_narrow(new) and not _is_narrow(old):
                self._buffers[name] = old.to(new.device)
            if name.startswith(COUNTS) and not new.is_meta:  # to_empty leaves it what no state dict would put right
                new.fill_(0) if old.is_meta else new.copy_(old)
        return self

    # Frozen flags travel in the state dict's metadata, for which torch's layers have no use, and so no complaint.

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
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)
        for name, buffer in self._buffers.items():  # with assign=True they are the state dict's own
            if buffer is not None and _is_narrow(buffer):
                self._buffers[name] = buffer.float()
        mean = self._buffers["running_mean"]
        for name, buffer in self._buffers.items():
            if (
                name.startswith(COUNTS) and buffer is not None and buffer.is_meta and mean is not None
            ):  # with assign=True
                self._buffers[name] = torch.zeros_like(buffer, device=mean.device)
        if "frozen" in local_metadata:
            frozen = local_metadata["frozen"]
            self.freeze(statistics="statistics" in frozen, affine="affine" in frozen)
            self.unfreeze(statistics="statistics" not in frozen, affine="affine" not in frozen)

    def freeze(self, *, statistics: bool = True, affine: bool = False) -> None:
        """Normalise with the running statistics, and move them no more; with ``affine`` keep gamma and beta too.

        The layer stays so through ``train()``, copies, and state dicts.
        """
        if statistics and not self.frozen_statistics:
            if self._buffers["running_mean"] is None:
                raise InputError("to freeze the statistics there must be running ones; got track_running_stats=False")
            self.frozen_statistics = True
        if affine and not self.frozen_affine:
            self.frozen_affine = True
            given = dict(self.named_parameters())  # also of parametrizations
            self._untrained = [name for name, parameter in given.items() if not parameter.requires_grad]
            for parameter in given.values():
                parameter.requires_grad = False  # which a lazy layer's may be told too
                parameter.grad = None  # or an optimizer would still use it

    def unfreeze(self, *, statistics: bool = True, affine: bool = True) -> None:
        """Undo `freeze`."""
        if statistics:
            self.frozen_statistics = False
        if affine and self.frozen_affine:
            self.frozen_affine = False
            for name, parameter in self.named_parameters():
                parameter.requires_grad = name not in self._untrained

    # What belongs to the step at hand is in no copy.

    def __getstate__(self) -> dict[str, Any]:
        step = {"_held": False, "_pool": None, "_first_runs": FirstRuns(), "active_domain": None, "_agreed": False}
        group = None if self.process_group is None else Shared(self.process_group)
        return self.__dict__ | step | {"process_group": group, "_plans": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        shared = state["process_group"]
        super().__setstate__(state | {"process_group": None if shared is None else shared.group})  # type: ignore[no-untyped-call]
