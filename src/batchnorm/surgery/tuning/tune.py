"""Fine-tuning with frozen statistics, which the layer before each batch norm folds into its weight in each forward."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.fx import Node
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.nn.layer import Layer
from batchnorm.surgery.conversion.convert import convert
from batchnorm.surgery.derived import own_class
from batchnorm.surgery.examples import Example, check_kept, eval_outputs, largest_difference, trial_copy
from batchnorm.surgery.folding.arithmetic import STOCK, Affine, Foldable, is_foldable, probes, why_not
from batchnorm.surgery.folding.exposure import Exposure, why_further_arguments
from batchnorm.surgery.graph import Step, Unknown, has_hooks, read_dataflow
from batchnorm.surgery.graph.blocks import bound_arguments
from batchnorm.surgery.opening import COPIES, batch_norms, check_model, copied, is_lazy
from batchnorm.surgery.report import Left, Replacement, Surgery
from batchnorm.surgery.tuning.tuned_layers import folded_forward, tune_pair
from batchnorm.surgery.tuning.tuned_pairs import end_tuning

__all__ = ["tune"]

NO_STATISTICS = "not frozen: it keeps no running statistics, and normalizes with those of each batch"
ENDING = "Training moves no running statistics until batchnorm.unfreeze(model)."


def tune(model: nn.Module, example: Example | None = None, inplace: bool = False) -> tuple[nn.Module, Surgery]:
    """Freeze the running statistics of a model, and normalize within the layers before, for fine-tuning.

    Where a batch norm takes the output of a convolution or linear layer that feeds nothing else, that layer multiplies
    its weight by gamma / sqrt(var + eps) in each forward, and adjusts its bias likewise. Weight, bias, gamma and beta
    are trained as before and get the gradients of frozen batch norm, but the backward keeps one tensor less of the size
    of the output (You et al., "Efficient ConvBN Blocks for Transfer Learning and Beyond", ICLR 2024). All other batch
    norms are frozen. The model computes the same in training and eval mode, and its state dict stays the same.

    `unfreeze` ends it: the model has ordinary layers of batchnorm's then, which train with the statistics of batches.

    Parameters
    ----------
    model : Module
        Batch norms of other libraries are converted as `convert` does.
    example : Tensor, tuple or mapping, optional
        An input of the model, its positional arguments, or its keyword arguments. It is needed where the forward of a
        block cannot be read without running it, and to measure ``max_difference``.
    inplace : bool
        Change the model given, with the same parameters and buffers, so that its optimizer goes on.

    Returns
    -------
    tuple of Module and Surgery
        The model, by default a deep copy, and a report: the batch norms that the layers before them compute, and those
        that are left, with the reasons.

    Raises
    ------
    InputError
        The model has no batch normalization layer, or cannot be run on the example.
    InputTypeError
        The model is no module.
    UnsupportedError
        It is a wrapper, or holds one, or it is compiled, scripted or quantized; or its outputs on the example are not
        kept.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> tuned, report = bn.tune(model)
    >>> print(report)
    layer        before                after
    1       BatchNorm2d   folded into Conv2d
    <BLANKLINE>
    Training moves no running statistics until batchnorm.unfreeze(model).
    The parameters are copies: make a new optimizer, or call
    batchnorm.surgery.update_optimizer(old_model, new_model, optimizer).
    """
    check_model(model, "tune", takes_tuned=True)
    kinds = {path: own_class(norm).__name__ for path, norm in batch_norms(model, "tune").items()}
    before = [] if example is None else eval_outputs(model, example)
    twin = trial_copy(model, "tune") if inplace and example is not None else None
    if twin is not None and example is not None:
        _tuned(twin, example, kinds)
        check_kept("tune", before, eval_outputs(twin, example))
    tuned, layers, left = _tuned(model if inplace else copied(model, "tune"), example, kinds)
    difference = None
    if example is not None:
        after = eval_outputs(tuned, example)
        difference = largest_difference(before, after) if inplace else check_kept("tune", before, after)
    return tuned, Surgery(tuple(layers), tuple(left), difference, (ENDING, *(() if inplace else (COPIES,))))


def _tuned(
    tuned: nn.Module, example: Example | None, kinds: Mapping[str, str]
) -> tuple[nn.Module, list[Replacement], list[Left]]:
    """Tune a model in place; return it, the batch norms that were folded, and those that were left.

    ``kinds`` has the names of the classes of its batch norms, by path.
    """
    flow = read_dataflow(tuned, example)
    exposure = Exposure(flow)
    found = {path: _layer_before(exposure, tuned.get_submodule(path)) for path in kinds}
    for path in kinds:
        end_tuning(tuned.get_submodule(path))  # of an earlier call
    tuned, converted = convert(tuned, inplace=True)
    unknown = {left.path: left.reason for left in converted.left}
    layers, left = [], []
    for path, layer in found.items():
        kind, norm = kinds[path], tuned.get_submodule(path)
        if not isinstance(norm, Layer):
            left.append(Left(path, kind, f"neither frozen nor folded: {unknown[path]}"))
        elif norm.running_mean is None:
            left.append(Left(path, kind, NO_STATISTICS))
        else:
            norm.freeze()
            if isinstance(layer, str):
                around = path.rpartition(".")[0]  # equal reasons are listed together
                reason = layer.replace(f"{around} cannot be", "the block around it cannot be") if around else layer
                left.append(Left(path, kind, f"frozen, but not folded: {reason}"))
            else:
                tune_pair(layer, norm)
                layers.append(Replacement(path, kind, f"folded into {own_class(layer).__name__}"))
    return tuned, layers, left


def _layer_before(exposure: Exposure, norm: nn.Module) -> Foldable | str:
    """Return the layer that feeds a batch norm and nothing else, or the reason why none does as a clause."""
    flow = exposure.flow
    if has_hooks(norm):
        return "there are hooks on it, which see its input"
    if is_parametrized(norm):
        return "it is parametrized"
    if is_lazy(norm):
        return "it has seen no batch yet"
    if isinstance(norm, Layer) and (own_class(norm).forward is not Layer.forward or "forward" in vars(norm)):
        return f"{own_class(norm).__name__} has a forward of its own"
    calls = flow.calls(norm)
    if len(calls) != 1:
        return flow.why_no_single_call(norm)
    source = flow.source(calls[0])
    if isinstance(source, Unknown):
        return source.reason.replace("it is the input", "its input is the input")
    layer = flow.module(source)
    if layer is None:
        return f"it takes the output of {source.node.name}"
    kind = own_class(layer).__name__
    if not is_foldable(layer):
        return f"it takes the output of {kind}"
    if why := why_not(layer) or why_further_arguments(flow, layer):
        return why
    why = _why_not(layer, norm) or _why_not_together(exposure, source, calls[0])
    return f"the {kind} before it {why}" if why else layer


def _why_not(layer: Foldable, norm: nn.Module) -> str:
    """Return why a layer cannot compute the batch norm after it, a verb phrase; empty if it can."""
    if has_hooks(layer):
        return "has hooks, which see its output"
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    mean = getattr(norm, "running_mean", None)
    if mean is not None and mean.shape[0] != outputs:
        return f"has {outputs} channels, and it normalizes {mean.shape[0]}"
    if isinstance(norm, Layer) and norm.channel_dim not in _channel_dims(layer):
        return f"has its channels elsewhere than in channel_dim={norm.channel_dim}"
    return "" if own_class(layer) in STOCK or _keeps_to_its_weight(layer) else "has a forward of its own"


def _channel_dims(layer: Foldable) -> tuple[int, int]:
    """Return the dimension of the channels of a layer's output, counted from the first and from the last one."""
    return (1, -1) if isinstance(layer, nn.Linear) else (1, -1 - len(layer.kernel_size))


def _why_not_together(exposure: Exposure, source: Step, step: Step) -> str:
    """Return why a layer and a batch norm may not always run one after the other, a verb phrase."""
    flow = exposure.flow
    layer, norm = flow.module(source), flow.module(step)
    assert layer is not None
    assert norm is not None
    if len(flow.calls(layer)) > 1:
        return f"is called {len(flow.calls(layer))} times"
    for other in flow.uses(source):
        if isinstance(other, Unknown):
            return f"may have another use: {other.reason}"
        if other != step:
            return f"has another use: {other.node.name}"
    residual = bound_arguments(norm, step.node).get("residual")
    if isinstance(residual, Node) and flow.origin(Step(step.block, residual)) == source:
        return "is its residual too"
    if source.block != step.block and (why := flow.why_no_single_call(layer) or flow.why_no_single_call(norm)):
        return f"may run without it: {why}"
    seen = [flow.observed.get(flow.path(module), 0) for module in (layer, norm)]
    if seen[0] != seen[1]:
        return f"is called {seen[0]} times on the example, and it {seen[1]} times"
    why = exposure.why_called_elsewhere(layer) or exposure.why_called_elsewhere(norm)
    return f"may run without it: {why}" if why else ""


def _keeps_to_its_weight(layer: Foldable) -> bool:
    """Return whether a layer with a forward of its own computes a scale and shift that are folded into its weight.

    A copy of it is compared with the formula on small random inputs, in float64.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            return all(_folds(copy.deepcopy(layer), training) for training in (True, False))
    except Exception:  # noqa: BLE001 (a forward of the user's may raise anything)
        return False


def _folds(layer: Foldable, training: bool) -> bool:
    layer = layer.to(device="cpu", dtype=torch.float64).train(training)
    for parameter in layer.parameters():
        parameter.normal_()
    for x in probes(layer):
        y = layer(x)
        scale, shift = torch.randn(2, y.shape[1], dtype=torch.float64)
        shape = (-1, *[1] * (y.dim() - 2))
        found = folded_forward(own_class(layer), layer, Affine(scale, shift), x)
        if not torch.allclose(found, scale.view(shape) * y + shift.view(shape), rtol=1e-9, atol=1e-9):
            return False
    return True
