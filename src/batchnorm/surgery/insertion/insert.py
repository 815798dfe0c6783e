"""Batch normalization put into a network that has none, before or after the nonlinearity of every hidden layer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from torch import nn

from batchnorm.errors import InputError, InputTypeError
from batchnorm.nn import BatchNorm
from batchnorm.statistics.changes import layer_name
from batchnorm.surgery.examples import Example, check_kept, eval_outputs, largest_difference, trial_copy
from batchnorm.surgery.folding.folded import Folded
from batchnorm.surgery.graph import read_dataflow
from batchnorm.surgery.insertion.observing import Batches
from batchnorm.surgery.insertion.plan import Placement, Plan
from batchnorm.surgery.insertion.putting_back import PutBack
from batchnorm.surgery.insertion.step_kinds import HIDDEN_LAYERS
from batchnorm.surgery.opening import COPIES, check_model, copied, is_lazy
from batchnorm.surgery.report import Surgery

__all__ = ["insert"]

FROM_PLACE = ("num_features", "device", "dtype", "activation", "channel_dim")
"""Options of a layer that follow from its place."""

UNTRAINED = "The model computes something else now: train it. With preserve=True it computes the same at first."


def insert(
    model: nn.Module,
    placement: Placement = "before",
    example: Example | Iterable[Any] | None = None,
    preserve: bool = False,
    inplace: bool = False,
    **options: Any,
) -> tuple[nn.Module, Surgery]:
    """Put a batch normalization layer at every hidden layer of a network that has none there.

    A hidden layer is a linear layer or a convolution whose output reaches a nonlinearity, perhaps through pooling,
    dropout, a reshape or the addition of a residual branch. Output layers, attention projections, gates, recurrent
    layers, embeddings, layers that are called several times, and hidden layers that a normalization follows already are
    left alone; the report lists each with the reason.

    Into a model of `fold` the layers come back in the places of those that were folded, whatever the placement, and the
    model can be trained again.

    All names of the state dict stay. A new layer is called after the one in front of it, as ``conv1_bn``; it is on the
    device, in the dtype and in the mode of the hidden layer. With ``placement="before"`` the bias of the hidden layer
    is dropped, since beta takes its place.

    Parameters
    ----------
    model : Module
    placement : {"before", "after"}
        Normalize the output of the layer, before its nonlinearity, or the output of the nonlinearity.
    example : tensor, tuple, mapping, iterable or None
        An input of the model: a tensor, a tuple of positional or a mapping of keyword arguments. Or a loader, with
        batches as `recalibrate` takes them. It shows the shapes, and the calls in forwards that cannot be traced.
    preserve : bool
        Keep the function that a trained network computes in eval mode. The running statistics are the moments over the
        example, gamma is sqrt(var + eps), and beta is the mean.
    inplace : bool
        Operate on the model given, whose other parameters stay the same objects.
    **options
        Options of the new layers, as ``eps``, ``momentum`` or ``sync``.

    Returns
    -------
    tuple of Module and Surgery
        The model, by default a deep copy, and a report. With ``preserve`` its ``max_difference`` is that of the outputs
        on the first batch of the example.

    Raises
    ------
    InputError
        The model has no linear layer or convolution, or a lazy one; there is no example for ``preserve``, or it does
        not fit; an option is out of its range.
    InputTypeError
        The model or the example has the wrong type.
    UnsupportedError
        The model is wrapped for several processes, compiled or quantized; or ``preserve`` does not keep its outputs on
        the example.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> model, report = bn.insert(model)
    >>> [name for name, _ in model.named_children()]
    ['0', '0_bn', '1', '2']
    """
    check_model(model, "insert")
    _check_arguments(model, placement, options)
    if preserve:
        _check_preserve(example, options)
    batches = None if example is None else Batches(model, example)
    flow = read_dataflow(model, None if batches is None else batches.first)
    is_folded = any(isinstance(module, Folded) for module in model.modules())
    plan = PutBack(flow) if is_folded else Plan(flow, placement)
    plan.find_layouts(batches, preserve=preserve)
    layers = plan.layers(options, preserve=preserve)
    before = eval_outputs(model, batches.first) if preserve and batches is not None else []
    changed, notes = plan.replacements(), [*plan.notes()]  # of the model as it was given
    measured = batches.first if preserve and batches is not None else None
    twin = trial_copy(model, "insert") if inplace and measured is not None else None
    if twin is not None and measured is not None:
        plan.apply(twin, copy.deepcopy(layers))
        check_kept("insert", before, eval_outputs(twin, measured))
    operated = model if inplace else copied(model, "insert")
    plan.apply(operated, layers)
    difference = None
    if measured is not None:
        after = eval_outputs(operated, measured)
        difference = largest_difference(before, after) if inplace else check_kept("insert", before, after)
    notes += [] if preserve or not layers else [UNTRAINED]
    notes += [] if inplace or not layers else [COPIES]
    return operated, Surgery(changed, plan.left, difference, tuple(notes))


def _check_arguments(model: nn.Module, placement: str, options: Mapping[str, Any]) -> None:
    if placement not in get_args(Placement):
        raise InputError(f"placement must be {' or '.join(map(repr, get_args(Placement)))}; got {placement!r}")
    chosen = [name for name in FROM_PLACE if name in options]
    if chosen:
        raise InputError(
            f"{chosen[0]} of a new layer follows from its place in the model; got {chosen[0]}={options[chosen[0]]!r}"
        )
    known = inspect.signature(BatchNorm).parameters.keys()
    unknown = sorted(options.keys() - known)
    if unknown:
        names = [name for name in known if name not in FROM_PLACE]
        raise InputTypeError(f"insert takes the options of a layer, {', '.join(names)}; got {', '.join(unknown)}")
    BatchNorm(1, **options)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, HIDDEN_LAYERS)}
    if not layers:
        raise InputError(
            f"insert needs a model with torch's linear layers or convolutions; {type(model).__name__} has none"
        )
    for path, module in layers.items():
        if is_lazy(module):
            raise InputError(
                f"the layers of the model must have their weights; got a lazy {type(module).__name__} at "
                f"{layer_name(path)}. Run the model on a batch first"
            )


def _check_preserve(example: object, options: Mapping[str, Any]) -> None:
    if example is None:
        raise InputError("preserve=True needs an example, of which it measures what passes the new layers; got None")
    lacking = [name for name in ("affine", "bias", "track_running_stats") if not options.get(name, True)]
    if lacking:
        raise InputError(
            f"preserve=True needs gamma, beta and running statistics, which undo each other; got {lacking[0]}=False"
        )
