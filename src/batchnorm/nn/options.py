"""What a layer may be asked for, checked when it is built: each option, and those that make no sense together."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch.distributed as dist

from batchnorm.errors import InputError
from batchnorm.functional import check_activation
from batchnorm.nn.renorm import Renorm, RenormSchedule

__all__ = ["Options", "check_options"]

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


def check_options(options: Options, *, eps: float, momentum: float | None, track_running_stats: bool) -> None:
    """Raise `InputError` where an option is out of its range, or needs another that is not there."""
    check_activation(options.activation)
    for name, known in CHOICES.items():
        value = getattr(options, name)
        if value not in known:
            raise InputError(f"{name} must be {' or '.join(map(repr, known))}; got {value!r}")
    if not _is_number(eps) or not 0 < eps < math.inf:
        raise InputError(f"eps must be above 0: where a channel is constant all is divided by its root; got {eps!r}")
    _check_momentum(momentum)
    size = options.virtual_batch_size
    if size is not None and not (_is_whole(size) and size >= 2):
        raise InputError(f"virtual_batch_size must be None or a whole number of samples from 2; got {size!r}")
    if options.renorm is not None and not isinstance(options.renorm, Renorm | RenormSchedule):
        raise InputError(f"renorm must be None, batchnorm.Renorm or batchnorm.RenormSchedule; got {options.renorm!r}")
    _check_sync(options)
    if not _is_whole(options.channel_dim):
        raise InputError(f"channel_dim must be a whole number; got {options.channel_dim!r}")
    if not track_running_stats:
        unfit = {"renorm": options.renorm is not None, "small_batch='running'": options.small_batch == "running"}
        for name in (name for name, asked in unfit.items() if asked):
            raise InputError(f"{name} uses the running statistics, of which track_running_stats=False keeps none")


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


def _check_momentum(momentum: float | None) -> None:
    if momentum is None:
        return
    if not _is_number(momentum) or not 0 <= momentum <= 1:
        raise InputError(f"momentum must be None or from 0 to 1, the weight of the new value; got {momentum!r}")
    if momentum >= KERAS_FROM:
        warnings.warn(
            f"momentum={momentum} gives the newest batch {momentum:.0%} of the running statistics, as in torch; Keras "
            f"weighs the old value: its {momentum} is momentum={1 - momentum:.4g} here",
            stacklevel=4,
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
