"""Training steps of two models that must be the same: ``from steps_of_models import assert_same_training``."""

import copy

import torch
from torch import Tensor


def tensors_in(output):
    """Return the tensors of an output: a tensor, a tuple, or an output of transformers."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    return [value for value in values if isinstance(value, Tensor)]


def train(model, x, steps=3, seed=0):
    """Return the outputs, the gradients and the running statistics of a few steps of gradient descent on a copy."""
    model = copy.deepcopy(model).train()
    optimizer, outputs = torch.optim.SGD(model.parameters(), 0.01), []
    for step in range(steps):
        torch.manual_seed(seed + step)
        optimizer.zero_grad()
        found = tensors_in(model(x))
        weights = [torch.randn(y.shape, dtype=y.dtype) for y in found]
        sum((y * w).mean() for y, w in zip(found, weights, strict=True)).backward()
        optimizer.step()
        outputs += [y.detach() for y in found]
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    statistics = {name: buffer for name, buffer in model.named_buffers() if "running" in name}
    torch.manual_seed(seed)
    with torch.no_grad():
        evaluated = tensors_in(model.eval()(x))
    return outputs, gradients, statistics, evaluated


def assert_same_training(model, other, x, tolerance=1e-9):
    """Check that two models give the same outputs, gradients and statistics in training, and then in eval.

    Differences are relative to the largest number of each of the four.
    """
    for name, expected, found in zip(
        ("outputs", "gradients", "statistics", "outputs in eval"), train(model, x), train(other, x), strict=True
    ):
        if isinstance(expected, dict):
            assert found.keys() == expected.keys()
            expected, found = list(expected.values()), [found[key] for key in expected]
        largest = max(float(each.abs().max()) for each in expected)
        error = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
        assert error <= tolerance * largest, f"{name} differ by {error:.3g}, of at most {largest:.3g}"
