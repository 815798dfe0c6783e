"""What a layer may be asked for, checked when it is built: each option, and those that make no sense together."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch.distributed as dist

from batchnorm.checks import check_activation, check_momentum, is_real, is_whole
from batchnorm.errors import InputError, warn
from batchnorm.nn.renorm import Renorm, RenormSchedule

__all__ = ["ATTRIBUTES", "Options", "checked_numbers", "checked_options"]

CHOICES = {
    "small_batch": ("raise", "running"),
    "nonfinite": ("skip", "propagate"),
    "running_var": ("unbiased", "biased"),
}
KERAS_FROM = 0.9


@dataclass(frozen=True)
class Options:
    """What our layers have beside torch's settings, with the defaults."""

    activation: str | None = None
    small_batch: str = "raise"
    nonfinite: str = "skip"
    virtual_batch_size: int | None = None
    renorm: Renorm | RenormSchedule | None = None
    sync: bool = False
    process_group: object = None
    channel_dim: int = 1
    running_var: str = "unbiased"


# The attribute of a layer that holds each option; running_var is the name of a buffer.
ATTRIBUTES = {field.name: field.name for field in fields(Options)} | {"running_var": "running_var_kind"}


def checked_numbers(num_features: int, eps: float, momentum: float | None) -> tuple[int, float, float | None]:
    """Torch's settings as Python's numbers.

    Raises
    ------
    InputError
        One is out of its range.
    """
    if not is_whole(num_features) or num_features < 0:
        raise InputError(f"num_features must be a whole number from 0; got {num_features!r}")
    if not is_real(eps) or not 0 < eps < math.inf:
        raise InputError(f"eps must be above 0: where a channel is constant all is divided by its root; got {eps!r}")
    check_momentum(momentum)
    if momentum is not None and momentum >= KERAS_FROM:
        _warn_of_keras(momentum)
    return int(num_features), float(eps), None if momentum is None else float(momentum)


def checked_options(options: Options, *, track_running_stats: bool) -> Options:
    """The options, with Python's numbers in the place of NumPy's.

    Raises
    ------
    InputError
        One is out of its range, or needs another that is not there.
    """
    check_activation(options.activation)
    for name, known in CHOICES.items():
        value = getattr(options, name)
        if not (isinstance(value, str) and value in known):
            raise InputError(f"{name} must be {' or '.join(map(repr, known))}; got {value!r}")
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
        for name in (name for name, asked in unfit.items() if asked):
            raise InputError(f"{name} uses the running statistics, of which track_running_stats=False keeps none")
    return replace(
        options, channel_dim=int(options.channel_dim), virtual_batch_size=None if size is None else int(size)
    )


def _check_sync(options: Options) -> None:
    if not isinstance(options.sync, bool):
        raise InputError(f"sync must be True or False; got {options.sync!r}")
    if options.sync and options.virtual_batch_size is not None:
        raise InputError(
            "sync=True gives a batch one mean and variance over all processes, virtual batches have many in each: they "
            f"can't be had together; got virtual_batch_size={options.virtual_batch_size}"
        )
    group = options.process_group
    if group is None:
        return
    if not options.sync:
        raise InputError(f"process_group is what sync=True takes statistics over; got sync=False and {group!r}")
    if not dist.is_available() or not (
        isinstance(group, dist.ProcessGroup) or group == dist.GroupMember.NON_GROUP_MEMBER
    ):
        raise InputError(f"process_group must be None or a torch.distributed.ProcessGroup; got {group!r}")


def _warn_of_keras(momentum: float) -> None:
    warn(
        f"momentum={momentum} gives the newest batch {momentum:.0%} of the running statistics, as in torch; Keras "
        f"weighs the old value: its {momentum} is momentum={1 - momentum:.4g} here"
    )
