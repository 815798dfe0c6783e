"""Cases of same_numbers.py: outputs, gradients and running statistics of the layers under all their options."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from same_numbers_values import Values, gradients, normal, prefixed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

__all__ = [
    "BIASED",
    "DENSE",
    "DTYPES",
    "LAYER_GROUPS",
    "LAYOUTS",
    "OPTIONS",
    "Batch",
    "batches",
    "layer_for",
    "step",
    "training",
]

BIASED = {"unbiased": False}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid")
SCHEDULE = bn.RenormSchedule(2.0, 1.0, start=1, r_end=4, d_end=3)  # its limits widen over the steps trained here
OPTIONS: dict[str, dict[str, Any]] = {
    **{f"activation={name}": {"activation": name} for name in ACTIVATIONS},
    "affine=False": {"affine": False},
    "bias=False": {"bias": False, "activation": "relu"},
    "eps=0.1": {"eps": 0.1},
    "momentum=None": {"momentum": None},
    "momentum=0.7": {"momentum": 0.7},
    "track_running_stats=False": {"track_running_stats": False},
    "small_batch=running": {"small_batch": "running"},
    "nonfinite=propagate": {"nonfinite": "propagate"},
    "virtual_batch_size=4": {"virtual_batch_size": 4},
    "virtual_batch_size=2": {"virtual_batch_size": 2, "activation": "leaky_relu"},
    "renorm": {"renorm": bn.Renorm(1.5, 0.5)},
    "renorm schedule": {"renorm": SCHEDULE, "activation": "relu"},
    "biased": BIASED,
    "sync": {"sync": True},
    "channel_dim=-1": {"channel_dim": -1, "activation": "relu"},
    "channel_dim=2": {"channel_dim": 2},
    "all together": {
        **BIASED,
        "activation": "gelu",
        "momentum": None,
        "virtual_batch_size": 3,
        "renorm": SCHEDULE,
        "channel_dim": -1,
    },
}
DENSE = ("contiguous", "channels last")
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "unaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}
SHAPES = (
    *((1, 1), (1, 5), (2, 1), (7, 3), (13, 17), (33, 64), (128, 257)),
    *((5, 3, 2), (2, 7, 31), (1, 1, 1), (3, 130, 1), (1, 6, 11)),
    *((2, 3, 1, 1), (3, 1, 5, 5), (4, 37, 7, 7), (1, 16, 3, 3), (8, 24, 20, 20), (2, 3, 2, 3, 5)),
    *((0, 3), (0, 3, 4, 4), (4, 0, 3), (4, 3, 0)),
)


class Batch(NamedTuple):
    """The arguments of a layer's forward."""

    x: Tensor
    residual: Tensor | None = None
    mask: Tensor | None = None


def layer_for(x: Tensor, **options: Any) -> bn.BatchNorm:
    """Return a layer for batches like x, with weights and biases that are not 1 and 0."""
    features = x.shape[options.get("channel_dim", 1)]
    layer = bn.BatchNorm(features, dtype=x.dtype, **options)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(features, seed=100 + seed))
    return layer


def batch(x: Tensor, extras: str = "", seed: int = 0, channel_dim: int = 1) -> Batch:
    """Return x in a batch, with a residual and a mask that leaves out a quarter where ``extras`` names them."""
    residual = mask = None
    if "residual" in extras:
        residual = torch.empty_like(x).copy_(normal(*x.shape, seed=200 + seed))
    if "mask" in extras:
        positions = x.movedim(channel_dim, 1)[:, 0].shape
        mask = normal(*positions, seed=300 + seed) < 0.7
    return Batch(x, residual, mask)


def batches(
    shape: Sequence[int], dtype: torch.dtype, layout: str, extras: str = "", steps: int = 3, channel_dim: int = 1
) -> list[Batch]:
    """Return batches of one shape and layout, each with values of its own."""
    inputs = (normal(*shape, seed=seed, dtype=dtype) * 2 + 0.5 * seed for seed in range(steps))
    return [batch(LAYOUTS[layout](x), extras, seed, channel_dim) for seed, x in enumerate(inputs)]


def running_statistics(layer: nn.Module) -> Values:
    """Yield the tensors of a state dict, and the count of skipped batches, which is in none."""
    yield from layer.state_dict().items()
    if getattr(layer, "skipped_batches", None) is not None:
        yield "skipped_batches", layer.skipped_batches


def step(layer: nn.Module, given: Batch) -> Values:
    """Yield the output, gradients and statistics of one forward and backward."""
    x, residual, mask = given
    x = x.detach().requires_grad_()  # detached, it keeps its strides
    residual = None if residual is None else residual.detach().requires_grad_()
    y = layer(x, residual=residual, mask=mask)
    yield from gradients(y, {"x": x, "residual": residual, **dict(layer.named_parameters())})
    yield from running_statistics(layer)


def training(layer: nn.Module, given: Sequence[Batch]) -> Values:
    """Yield the values of a training step per batch, then of the last batch in eval mode."""
    for number, each in enumerate(given):
        yield from prefixed(f"step {number}", step(layer, each))
    layer.eval()
    yield from prefixed("eval", step(layer, given[-1]))
    layer.train()


def options() -> Values:
    """Yield every option in every dtype, dense layout and combination of residual and mask."""
    combinations = ("", "residual", "mask", "residual and mask")
    for (name, given), dtype, layout, extras in itertools.product(OPTIONS.items(), DTYPES, DENSE, combinations):
        data = batches((7, 19, 5, 7), dtype, layout, extras, channel_dim=given.get("channel_dim", 1))
        layer = layer_for(data[0].x, **given)
        yield from prefixed(f"{name}, {dtype}, {layout}, {extras or 'alone'}", training(layer, data))


def shapes() -> Values:
    """Yield every shape in every layout and dtype, including empty batches and those of a single value per channel."""
    for shape, layout, dtype in itertools.product(SHAPES, LAYOUTS, DTYPES):
        if layout == "expanded" and not shape[0]:
            continue
        for extras, activation in (("", None), ("residual", "relu")):
            data = batches(shape, dtype, layout, extras)
            layer = layer_for(data[0].x, small_batch="running", activation=activation)
            yield from prefixed(f"{shape}, {layout}, {dtype}, {activation}", training(layer, data))


def classes() -> Values:
    """Yield the layers for 1, 2, 3 and any number of dimensions, lazy ones too, in mixed precision."""
    names = {"BatchNorm1d": (6, 5, 3), "BatchNorm2d": (6, 5, 3, 3), "BatchNorm3d": (6, 5, 2, 2, 3), "BatchNorm": (6, 5)}
    for (name, shape), dtype, layout in itertools.product(names.items(), DTYPES, LAYOUTS):
        data = batches(shape, dtype, layout, "residual")
        eager = getattr(bn, name)(5, activation="silu", **BIASED)
        lazy = getattr(bn, f"Lazy{name}")(activation="silu", **BIASED)
        for label, layer in {"float32": eager, "lazy": lazy, "cast": getattr(bn, name)(5).to(dtype)}.items():
            yield from prefixed(f"{name}, {label}, {dtype}, {layout}", training(layer, data))


def values() -> Values:
    """Yield batches of large means, constants, tiny and huge values, and batches that are not finite."""
    x = normal(9, 6, 8, 5, dtype=torch.float64)
    finite = {"mean 1e5": x + 1e5, "constant": x * 0 + 100.1, "tiny": x * 1e-40, "huge": x * 1e30, "zeros": x * -0.0}
    outlier, infinite, nan = x.clone(), x.clone(), x.clone()
    outlier[0, :, 0, 0], infinite[3, 2, 1, 1], nan[4, 5, 0, 0] = 1e4, torch.inf, torch.nan
    special = finite | {"outlier": outlier, "infinite": infinite, "nan": nan, "all nan": x * torch.nan}
    names = ("activation=relu", "nonfinite=propagate", "momentum=None", "virtual_batch_size=4", "renorm schedule")
    cases = itertools.product(special.items(), DTYPES, DENSE, names, ("", "mask"))
    for (label, data), dtype, layout, name, extras in cases:
        sequence = [batch(LAYOUTS[layout](each.to(dtype)), extras) for each in (x, data, x)]
        layer = layer_for(sequence[0].x, **OPTIONS[name])
        yield from prefixed(f"{label}, {dtype}, {layout}, {name}, {extras}", training(layer, sequence))


def repeated_calls() -> Values:
    """Yield the calls of one layer whose inputs, modes and options change in turn, so that plans are made and left."""
    layer = layer_for(normal(6, 12, 4), activation="relu")
    inputs = [each for dtype in DTYPES for layout in LAYOUTS for each in batches((6, 12, 4), dtype, layout, steps=1)]
    inputs += [batch(normal(rows, 12), extras) for rows in (6, 33, 6) for extras in ("", "residual")]
    turns: dict[str, dict[str, Any]] = {
        "first": {"training": True},
        "again": {"training": True},
        "eval": {"training": False},
        "cumulative": {"training": True, "momentum": None},
        "leaky": {"training": True, "activation": "leaky_relu"},
    }
    for turn, settings in turns.items():
        for name, value in settings.items():
            setattr(layer, name, value)
        for number, given in enumerate(inputs):
            label = f"{turn}, input {number}"
            yield from prefixed(label, step(layer, given))
            with torch.no_grad():
                yield f"{label}, without gradients", layer(*given)
            with torch.inference_mode():
                yield f"{label}, inference mode", layer(*given)
            y = layer(given.x, residual=given.x)
            yield from prefixed(f"{label}, its own residual", gradients(y, {"weight": layer.weight}))
    layer.unbiased = False
    yield from prefixed("biased at last", step(layer, inputs[0]))


def updates() -> Values:
    """Yield accumulated batches, domains, paused updates, copies and frozen layers, alone and with other options."""
    names = ("activation=relu", "biased", "momentum=None", "virtual_batch_size=4", "renorm schedule")
    for name, dtype in itertools.product(names, DTYPES):
        data = batches((9, 12, 4, 3), dtype, "contiguous", "residual", steps=4)
        bad = Batch(data[1].x.clone().fill_(torch.inf), data[1].residual)
        label = f"{name}, {dtype}"
        layer = bn.add_domains(layer_for(data[0].x, **OPTIONS[name]), ["real", "drawn"])
        with bn.accumulate(layer):
            yield from prefixed(f"{label}, accumulated", training(layer, [*data[:2], bad, data[3]]))
            with bn.use_domain(layer, "drawn"):
                yield from prefixed(f"{label}, domain", training(layer, data))
        yield from prefixed(f"{label}, after accumulating", training(layer, data[:1]))
        with bn.no_stat_updates(layer):
            yield from prefixed(f"{label}, paused", training(layer, data))
        yield from prefixed(f"{label}, copied", training(copy.deepcopy(layer), data))
        for affine in (False, True):
            yield from prefixed(f"{label}, frozen {affine}", training(bn.freeze(layer, affine=affine), data))
        yield from prefixed(f"{label}, not frozen", training(bn.unfreeze(layer), data))


def checkpoints() -> Values:
    """Yield layers under activation checkpointing of both kinds, on the same and on successive batches."""
    names = ("activation=gelu", "virtual_batch_size=2", "renorm schedule")
    for name, dtype, reentrant in itertools.product(names, DTYPES, (False, True)):
        data = batches((9, 12, 4, 3), dtype, "contiguous", steps=3)
        layer = layer_for(data[0].x, **OPTIONS[name])
        for number, each in enumerate([*data, data[0]]):
            x = each.x.detach().requires_grad_()
            y = checkpoint(layer, checkpoint(layer, x, use_reentrant=reentrant), use_reentrant=reentrant)
            wanted = [x, *layer.parameters()]
            y.backward(normal(*y.shape, seed=400, dtype=dtype))
            label = f"{name}, {dtype}, {reentrant}, step {number}"
            yield from prefixed(label, [(f"gradient {i}", value.grad) for i, value in enumerate(wanted)])
            yield from prefixed(label, running_statistics(layer))


def threads() -> Values:
    """Yield batches that are large enough to be divided among two threads."""
    torch.set_num_threads(2)
    try:
        large = ((10, 16, 40, 40), (3100, 65))
        for shape, layout, dtype in itertools.product(large, DENSE, DTYPES):
            data = batches(shape, dtype, layout, "residual", steps=2)
            yield from prefixed(f"{shape}, {layout}, {dtype}", training(layer_for(data[0].x, activation="relu"), data))
    finally:
        torch.set_num_threads(1)


LAYER_GROUPS: dict[str, Callable[[], Values]] = {
    each.__name__: each for each in (options, shapes, classes, values, repeated_calls, updates, checkpoints, threads)
}
