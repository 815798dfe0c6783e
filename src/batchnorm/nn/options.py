"""The options of a layer, and their checks, which run when it is built and when an option is set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch.distributed as dist

from batchnorm.checks import Activation, check_activation, check_eps, check_momentum, is_whole
from batchnorm.errors import InputError, warn
from batchnorm.nn.renorm import Renorm, RenormSchedule

__all__ = ["Nonfinite", "Options", "SmallBatch", "checked_numbers", "checked_options"]

SmallBatch = Literal["raise", "running"]
Nonfinite = Literal["skip", "propagate"]

CHOICES = {"small_batch": get_args(SmallBatch), "nonfinite": get_args(Nonfinite)}
KERAS_FROM = 0.9
"""Momentum from which a warning asks whether Keras's convention is meant."""


@dataclass(frozen=True)
class Options:
    """The options that our layers have and torch's do not, with their defaults."""

    activation: Activation | None = None
    small_batch: SmallBatch = "raise"
    nonfinite: Nonfinite = "skip"
    virtual_batch_size: int | None = None
    renorm: Renorm | RenormSchedule | None = None
    sync: bool = False
    process_group: object = None
    channel_dim: int = 1
    unbiased: bool = True


def checked_numbers(num_features: int, eps: float, momentum: float | None) -> tuple[int, float, float | None]:
    """Return torch's settings as numbers of Python.

    Raises
    ------
    InputError
        One is out of its range.
    """
    if not is_whole(num_features) or num_features < 0:
        raise InputError(f"num_features must be a whole number from 0; got {num_features!r}")
    check_eps(eps)
    check_momentum(momentum)
    if momentum is not None and KERAS_FROM <= momentum <= 1:
        _warn_of_keras(momentum)
    return int(num_features), float(eps), None if momentum is None else float(momentum)


def checked_options(options: Options, *, track_running_stats: bool) -> Options:
    """Return the options with numbers of Python in the place of NumPy's.

    Raises
    ------
    InputError
        One is out of its range, or needs another that is not set.
    """
    check_activation(options.activation)
    for name, known in CHOICES.items():
        value = getattr(options, name)
        if not (isinstance(value, str) and value in known):
            raise InputError(f"{name} must be {' or '.join(map(repr, known))}; got {value!r}")
    for name in ("sync", "unbiased"):
        if not isinstance(getattr(options, name), bool):
            raise InputError(f"{name} must be True or False; got {getattr(options, name)!r}")
    size = options.virtual_batch_size
    if size is not None and not (is_whole(size) and size >= 2):
        raise InputError(f"virtual_batch_size must be None or a whole number of samples from 2; got {size!r}")
    if options.renorm is not None and not isinstance(options.renorm, Renorm | RenormSchedule):
        raise InputError(f"renorm must be None, batchnorm.Renorm or batchnorm.RenormSchedule; got {options.renorm!r}")
    _check_sync(options)
    if not is_whole(options.channel_dim):
        raise InputError(f"channel_dim must be a whole number; got {options.channel_dim!r}")
    if not track_running_stats:
        unfit = {"renorm": options.renorm is not None, "small_batch='running'": options.small_batch == "running"}
        for name in (name for name, is_set in unfit.items() if is_set):
            raise InputError(f"{name} uses the running statistics; got track_running_stats=False, which keeps none")
    return replace(
        options, channel_dim=int(options.channel_dim), virtual_batch_size=None if size is None else int(size)
    )


def _check_sync(options: Options) -> None:
    if options.sync and options.virtual_batch_size is not None:
        raise InputError(
            "sync=True and virtual_batch_size exclude each other: one takes a single mean and variance over all "
            "processes, the other several in each process; got "
            f"virtual_batch_size={options.virtual_batch_size}"
        )
    group = options.process_group
    if group is None:
        return
    if not options.sync:
        raise InputError(
            f"process_group needs sync=True, which shares statistics over it; got sync=False and {group!r}"
        )
    if not dist.is_available() or not (
        isinstance(group, dist.ProcessGroup) or group == dist.GroupMember.NON_GROUP_MEMBER
    ):
        raise InputError(f"process_group must be None or a torch.distributed.ProcessGroup; got {group!r}")


def _warn_of_keras(momentum: float) -> None:
    warn(
        f"momentum={momentum} gives the newest batch {momentum:.0%} of the running statistics, as in torch; Keras "
        f"weighs the old value, so that its {momentum} is momentum={1 - momentum:.4g} here"
    )
