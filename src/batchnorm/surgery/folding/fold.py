"""Batch normalization folded into the weights of its neighbors, for inference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from batchnorm.nn.layer import Layer
from batchnorm.surgery.acceleration.rewriting import leaves_steps_to_layers, restore_forwards
from batchnorm.surgery.examples import Example, check_kept, eval_outputs, largest_difference, trial_copy
from batchnorm.surgery.folding import arithmetic
from batchnorm.surgery.folding.folded import Folded, become_folded, refuse_training
from batchnorm.surgery.folding.plan import Dims, Plan, Planned, plan_folds
from batchnorm.surgery.graph import Dataflow, read_dataflow
from batchnorm.surgery.norms.formula import Norm, is_batch_norm
from batchnorm.surgery.opening import batch_norms, check_contexts, check_model, copied, opened, untuned
from batchnorm.surgery.report import Left, Replacement, Surgery

__all__ = ["fold"]


def fold(model: nn.Module, example: Example | None = None, inplace: bool = False) -> tuple[nn.Module, Surgery]:
    """Make batch normalization with running statistics part of the weights of the layers beside it.

    At inference batch normalization is ``scale * x + shift`` for each channel, which a linear layer or a convolution,
    transposed and grouped ones too, can compute by itself. So each batch norm layer is folded into the layer before
    it, or else into the next, if that is exact and nothing else uses what stands between them. The others are left
    alone, and the report says why. Weights are computed in float64 and rounded once.

    The model returned is in eval mode and for inference: its ``train()`` raises an error. The names in its state dict
    are those of before, without the folded layers, and with a ``bias`` for each layer that had none.

    Parameters
    ----------
    model : Module
    example : tensor, tuple, mapping or None
        Arguments for the model. With it blocks are read that torch.fx cannot trace, inputs (N, L, C) of linear layers
        are known, and the report has the difference of the outputs.
    inplace : bool
        Fold in the model given. Its parameters stay the same objects, with other values.

    Returns
    -------
    tuple of Module and Surgery
        The model, by default a copy, and the report of the layers that were folded and those that were left alone.

    Raises
    ------
    InputError
        The model has no batch normalization layer; the example is no input of the model.
    UnsupportedError
        The model is wrapped, scripted or quantized, or cannot be copied; or its outputs on the example are not kept.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), bn.BatchNorm2d(8, activation="relu"))
    >>> folded, report = bn.fold(model.eval(), torch.randn(1, 3, 9, 9))
    >>> folded[1]
    Folded(
      dims=4
      (activation): ReLU()
    )
    """
    check_model(model, "fold", takes_tuned=not inplace)
    model = untuned(model, "fold", inplace=inplace)
    folded = sum(isinstance(module, Folded) for module in model.modules())
    if folded and not any(is_batch_norm(module) for module in model.modules()):
        notes: tuple[str, ...] = (f"Nothing is left to fold: all {folded} layers have been folded before.",)
        return opened(model, "fold", inplace=inplace), Surgery((), notes=notes)
    read = _with_own_forwards(model)
    norms = batch_norms(read, "fold")
    before, dims = ([], {}) if example is None else _outputs_and_dims(read, example, norms)
    # Where it can be, the model given is read, since no copy has the contexts that are open for its layers.
    flow = read_dataflow(read, example)
    plan = plan_folds(flow, norms, dims)
    layers = tuple(_replacement(path, plan.folds[path]) for path in norms if path in plan.folds)
    left = tuple(Left(path, type(norms[path]).__name__, plan.left[path]) for path in norms if path in plan.left)
    notes = (*_notes(model, layers), *(flow.notes() if left else ()))
    twin = trial_copy(model, "fold") if inplace and example is not None else None
    if twin is not None and example is not None:
        restore_forwards(twin)
        _apply(twin, plan, flow)
        check_kept("fold", before, eval_outputs(twin, example))
    target = opened(model, "fold", inplace=inplace)
    restore_forwards(target)
    _apply(target, plan, flow)
    difference = None
    if example is not None:
        after = eval_outputs(target, example)
        difference = largest_difference(before, after) if inplace else check_kept("fold", before, after)
    return target, Surgery(layers, left, difference, notes)


def _with_own_forwards(model: nn.Module) -> nn.Module:
    """Return a copy whose layers do no additions, if accelerate has left some to them; other models as they are."""
    if not any(map(leaves_steps_to_layers, model.modules())):
        return model
    check_contexts(dict(model.named_modules()), "fold", "an accelerated model", "batchnorm.to_torch(model)")
    twin = copied(model, "fold")
    restore_forwards(twin)
    return twin


def _outputs_and_dims(model: nn.Module, example: Example, norms: Mapping[str, nn.Module]) -> tuple[list[Tensor], Dims]:
    """Return the outputs on the example in eval mode, and the numbers of dimensions of batch norm layers' inputs."""
    dims: dict[nn.Module, set[int]] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        dims.setdefault(module, set()).update(value.dim() for value in given[:1])

    with ExitStack() as stack:
        for module in norms.values():
            stack.callback(module.register_forward_pre_hook(look, with_kwargs=True).remove)
        return eval_outputs(model, example), dims


def _apply(model: nn.Module, plan: Plan, flow: Dataflow) -> None:
    """Fold a model as planned; the plan and the data flow are of this one, or of the one that it is a copy of."""
    model.eval()
    for layer, weights in plan.weights.items():
        norm = next(each.norm for each in plan.folds.values() if each.layer is layer)
        trains = (layer.weight if norm.bias is None else norm.bias).requires_grad
        arithmetic.set_weights(model.get_submodule(flow.path(layer)), weights, trains=trains)  # type: ignore[arg-type]
    for path, planned in plan.folds.items():
        module = model.get_submodule(path)
        become_folded(module, Folded(planned.dims, behind(planned.norm, module), copies=planned.copies))
    refuse_training(model)


def _replacement(path: str, planned: Planned) -> Replacement:
    module = planned.norm.module
    parts = ["Folded", *(type(each).__name__ for each in behind(planned.norm, module).values())]
    domains = module.domain_names if isinstance(module, Layer) else []
    return Replacement(path, type(module).__name__, ", ".join(parts), (f"domains={domains!r}",) if domains else ())


def behind(norm: Norm, module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a layer that run behind the normalization, by the names that they have in it, if any.

    The layer, ``module``, is that of ``norm`` or a copy of it.
    """
    if norm.activation is None:
        return {}
    names = {norm.module.get_submodule(name): name for name in norm.children}
    is_child = norm.activation in names or not isinstance(norm.activation, nn.Sequential)
    parts = [norm.activation] if is_child else list(norm.activation.children())
    children = {names[part]: module.get_submodule(names[part]) for part in parts if part in names}
    others = [part for part in parts if part not in names]
    return children | {"activation" if "activation" not in children else "activation_": part for part in others}


def _notes(model: nn.Module, layers: tuple[Replacement, ...]) -> Iterator[str]:
    if model.training:
        yield "The model was in training mode. It is in eval mode now, with the running statistics of before."
    if layers:
        yield "The model is for inference: its train() raises an error."
