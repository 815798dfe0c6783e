"""Cases of same_numbers.py: pure functions, the transforms of torch.func, torch.compile and `explain`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from same_numbers_layers import DENSE, DTYPES, OPTIONS, batches, layer_for, training
from same_numbers_values import Values, gradients, normal, prefixed
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import batchnorm as bn

__all__ = ["FUNCTION_GROUPS"]


def functional() -> Values:
    """Yield `batch_norm` and `normalize` with and without their options, and their second derivatives."""
    cases = itertools.product(DTYPES, DENSE, (True, False), (None, "relu", "gelu"), (True, False))
    for dtype, layout, in_training, activation, full in cases:
        given = batches((6, 19, 5), dtype, layout, "residual and mask" if full else "", steps=1)[0]
        x, *others = (each.detach().requires_grad_() for each in given[:2] if each is not None)
        weight, bias = (normal(19, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2))
        mean, var = normal(19, seed=3), normal(19, seed=4).square()
        options: dict[str, Any] = {"activation": activation, "mask": given.mask, "residual": (*others, None)[0]}
        label = f"{dtype}, {layout}, {in_training}, {activation}, {full}"
        inputs = {"x": x, "weight": weight, "bias": bias, "residual": options["residual"]}
        y = bn.batch_norm(x, mean, var, weight, bias, in_training, 0.3, **options)
        yield from prefixed(f"batch_norm, {label}", gradients(y, inputs))
        yield from prefixed(f"batch_norm, {label}", [("mean", mean), ("var", var)])
        stats = bn.Stats(mean, var, torch.tensor(2))
        y, moved = bn.normalize(x, stats, weight, bias, training=in_training, momentum=None, **options)
        yield from prefixed(f"normalize, {label}", gradients(y, inputs))
        yield from prefixed(f"normalize, {label}", moved._asdict().items())
        y, _ = bn.normalize(x, stats, weight, bias, training=in_training, **options)
        yield from prefixed(f"second derivatives, {label}", second_derivatives(y, inputs))
    yield "lengths_to_mask", bn.lengths_to_mask(torch.tensor([3, 0, 5]), 6)


def second_derivatives(y: Tensor, inputs: Mapping[str, Tensor | None]) -> Values:
    """Yield the gradients of the squared gradients of an output."""
    wanted = {name: value for name, value in inputs.items() if value is not None}
    first = torch.autograd.grad(y.square().sum(), list(wanted.values()), create_graph=True)
    total = torch.stack([each.double().square().sum() for each in first]).sum()
    second = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return zip(wanted, second, strict=True)


def loss(x: Tensor, weight: Tensor, target: Tensor, stats: bn.Stats, **options: Any) -> tuple[Tensor, bn.Stats]:
    """Return the squared distance of `normalize` from a target, and the new statistics."""
    y, moved = bn.normalize(x, stats, weight, **options)
    return (y - target).square().sum(), moved


def transforms() -> Values:
    """Yield `normalize`, and layers whose buffers are passed in, under the transforms of torch.func."""
    x, target, weight = normal(6, 5, 4), normal(6, 5, 4, seed=1), normal(5, seed=5)
    stats = bn.Stats(normal(5, seed=2), normal(5, seed=3).square(), torch.tensor(1))
    mask = normal(6, 4, seed=4) < 0.7
    for in_training, activation, used in itertools.product((True, False), (None, "relu", "tanh"), (None, mask)):
        options: dict[str, Any] = {"training": in_training, "activation": activation, "mask": used}
        function = functools.partial(loss, target=target, stats=stats, **options)
        yield from prefixed(f"{in_training}, {activation}, {used is not None}", transformed(function, x, weight))
    for name, given in OPTIONS.items():
        if "channel_dim" not in given:
            yield from prefixed(name, under_functional_call(layer_for(x, **given), x))


def transformed(function: Callable[..., tuple[Tensor, bn.Stats]], x: Tensor, weight: Tensor) -> Values:
    """Yield the gradients, directional derivatives and mapped values of a loss of x and weight."""
    found, moved = grad(function, argnums=(0, 1), has_aux=True)(x, weight)
    yield from prefixed("grad", [("x", found[0]), ("weight", found[1]), *moved._asdict().items()])
    primal, tangent, moved = jvp(function, (x, weight), (x.flip(0), weight), has_aux=True)
    yield from prefixed("jvp", [("primal", primal), ("tangent", tangent), *moved._asdict().items()])
    mapped, moved = vmap(function, in_dims=(0, None))(torch.stack((x, x.flip(0) * 2)), weight)
    yield from prefixed("vmap", [("loss", mapped), *moved._asdict().items()])
    yield "jacrev", jacrev(function, argnums=1, has_aux=True)(x, weight)[0]


def under_functional_call(layer: nn.Module, x: Tensor) -> Values:
    """Yield the gradients of a layer whose parameters and buffers are arguments, and the buffers afterwards."""
    parameters, buffers = dict(layer.named_parameters()), {name: b.clone() for name, b in layer.named_buffers()}

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        y: Tensor = functional_call(layer, (parameters, buffers), (x,))
        return y.square().sum() + y[0].sum()

    yield from grad(loss)(parameters, buffers).items()
    yield from prefixed("buffers", ((name, buffers[name]) for name in layer.state_dict() if name in buffers))


def compiled() -> Values:
    """Yield compiled layers, in training and eval."""
    for name in ("activation=relu", "momentum=None", "biased", "virtual_batch_size=4", "renorm schedule"):
        torch.compiler.reset()
        data = batches((9, 12, 4), torch.float32, "contiguous", "residual")
        layer = layer_for(data[0].x, **OPTIONS[name])
        yield from prefixed(name, training(torch.compile(layer, backend="aot_eager"), data))


def explanations() -> Values:
    """Yield every number of `explain` for layers of ours and of torch, after one batch."""
    layers = {name: layer_for(normal(7, 5), **OPTIONS[name]) for name in ("activation=relu", "biased", "momentum=None")}
    layers["untracked"] = layer_for(normal(7, 5), track_running_stats=False, affine=False)
    layers["torch"] = nn.BatchNorm1d(5)
    for (name, layer), dtype in itertools.product(layers.items(), (torch.float32, torch.float64)):
        layer.to(dtype)(normal(8, 5, seed=1, dtype=dtype) + 3)
        for x in (normal(7, 5, dtype=dtype), normal(4, 5, 3, seed=2, dtype=dtype) * 100):
            yield from prefixed(f"{name}, {dtype}, {tuple(x.shape)}", explanation(bn.explain(layer, x)))


def explanation(found: bn.Explanation) -> Values:
    """Yield the tensors of an explanation and its two calculations, and its other numbers."""
    for label, part in {"batch": found, "training": found.training, "inference": found.inference}.items():
        fields = [] if part is None else dataclasses.fields(part)
        tensors = {field.name: getattr(part, field.name) for field in fields}
        yield from prefixed(label, [(name, value) for name, value in tensors.items() if isinstance(value, Tensor)])
    yield from [("count", found.count), ("bound", found.bound), ("eps", found.eps), ("momentum", found.momentum)]


FUNCTION_GROUPS: dict[str, Callable[[], Values]] = {
    each.__name__: each for each in (functional, transforms, compiled, explanations)
}
