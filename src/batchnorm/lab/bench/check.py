"""Check of our results before they are timed: outputs, gradients and statistics against the formulas in float64."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from batchnorm.kernels import reference
from batchnorm.kernels.records import BatchMoments, Operands, Rule
from batchnorm.kernels.reference import per_channel
from batchnorm.lab.bench.registry import OPERATIONS, Case
from batchnorm.lab.bench.sides import DTYPES, EPS, Inputs, Side, inputs, memory_format

__all__ = ["Expected", "expected", "find_fault"]

ROUNDING = 2.0**-24
"""Relative rounding error of float32: half a unit in the last place."""
STORED = {torch.float32: ROUNDING, torch.bfloat16: 2.0**-8}
"""Relative rounding error of the values that are stored."""
MARGIN = 16
MOMENTUM = 0.1


@dataclass(frozen=True)
class Expected:
    """A value in float64, and the rounding error that a float32 calculation may have, element by element."""

    value: Tensor
    tolerance: Tensor


@lru_cache(maxsize=1)  # neighboring cases, of two layouts and two modes, share it
def _oracle_results(shape: tuple[int, ...], dtype: str, operation: str, training: bool) -> dict[str, Expected]:
    """Return the results of the oracle with their tolerances.

    Derivation, where u is the rounding error of float32: a chain of products, or a sum, is off by a few u times the sum
    of the magnitudes of its terms. This holds for a long sum as well if its terms, and so its rounding errors, have
    both signs. The terms of a variance have one sign: a running sum of m of them is off by sqrt(m) u, which is a fault
    (6e-5 in y at m = 200,704) that blocks or a wider accumulator avoid. With 16 for "a few":

    - z = gamma * s * (x - mu) + beta + r: terms gamma * s * (|x| + |mu|), |beta|, |r|. Storing z rounds it again.
    - sum dz and sum dz * x_hat: terms |dz| and |dz| * s * (|x| + |mu|). Where |z| is below its own tolerance, both
      sides of ReLU's kink are right: these elements of dz and dx are ignored, and the sums may contain their terms or
      not.
    - dx = gamma * s * (dz - (sum dz) / m - x_hat * (sum dz * x_hat) / m): the three terms, and the errors of the sums.
    - Running statistics: the old and the new value.
    """
    case = Case(operation, "train" if training else "eval", dtype, shape)
    given = inputs(case)
    x, dy = given.x.double(), given.dy.double()
    residual = None if given.residual is None else given.residual.double()
    weight, bias, old_mean, old_var = (given.parameters[name].double() for name in given.parameters)
    activation = OPERATIONS[operation].activation
    m, few, stored = x.numel() // shape[1], MARGIN * ROUNDING, STORED[DTYPES[dtype]]
    used = reference.moments(x) if training else BatchMoments(old_mean, old_var, m)
    mu, s = used.mean, torch.rsqrt(used.var + EPS)
    dims = [d for d in range(x.dim()) if d != 1]

    operands, rule = Operands(x, weight, bias, residual), Rule(EPS, activation, training)
    y = reference.forward(operands, used, rule)
    terms = per_channel(s, x) * (x.abs() + per_channel(mu.abs(), x))
    z_tolerance = few * (per_channel(weight, x) * terms + per_channel(bias.abs(), x))
    if residual is not None:
        z_tolerance += few * residual.abs()
    result = {"y": Expected(y, z_tolerance + stored * (y.abs() + z_tolerance))}
    if not training:
        return result
    unbiased = used.var * (m / (m - 1))
    for name, old, new in (("running_mean", old_mean, mu), ("running_var", old_var, unbiased)):
        magnitude = used.var.sqrt() if name == "running_mean" else unbiased
        result[name] = Expected(old + MOMENTUM * (new - old), few * (old.abs() + new.abs() + magnitude))

    dx, dweight, dbias, dz = reference.backward(dy, operands, used, rule)
    kink = torch.zeros_like(x, dtype=torch.bool)
    if activation is not None:
        z = reference.forward(operands, used, rule._replace(activation=None))
        kink = z.abs() <= z_tolerance
    either = torch.where(kink, dy.abs(), 0.0)
    sum_err = few * dz.abs().sum(dims) + either.sum(dims)
    product_err = few * (dz.abs() * terms).sum(dims) + (either * terms).sum(dims)
    dx_tolerance = few * (dz.abs() + per_channel(dbias.abs() / m, x) + terms * per_channel(dweight.abs() / m, x))
    dx_tolerance += per_channel(sum_err / m, x) + terms * per_channel(product_err / m, x)
    dx_tolerance *= per_channel(weight * s, x)
    result["dx"] = Expected(dx, torch.where(kink, torch.inf, dx_tolerance + stored * (dx.abs() + dx_tolerance)))
    result["dweight"] = Expected(dweight, product_err)
    result["dbias"] = Expected(dbias, sum_err)
    if residual is not None:
        result["dresidual"] = Expected(dz, torch.where(kink, torch.inf, few * dz.abs() + stored * dz.abs()))
    return result


def expected(case: Case) -> dict[str, Expected]:
    """Return the expected results of a case: y, the running statistics if it updates them, and its gradients."""
    values = _oracle_results(case.shape, case.dtype, case.operation, case.mode != "eval")
    return {name: value for name, value in values.items() if case.mode == "train" or name[0] != "d"}


def _results(case: Case, given: Inputs, side: Side) -> dict[str, Tensor]:
    """Call a side once, and return its results by the names that `expected` uses."""
    layer, forward = side
    if case.mode != "train":
        with torch.no_grad():
            results = {"y": forward()}
    else:
        wanted = {"dx": given.x, "dweight": layer.weight, "dbias": layer.bias, "dresidual": given.residual}
        tensors = {name: value.requires_grad_() for name, value in wanted.items() if isinstance(value, Tensor)}
        y = forward()
        results = {"y": y.detach()}
        results |= zip(tensors, torch.autograd.grad(y, list(tensors.values()), given.dy), strict=True)
    if case.mode != "eval":
        results |= {name: value.detach() for name, value in layer.named_buffers() if name.startswith("running")}
    return results


def find_fault(case: Case, given: Inputs, side: Side) -> str | None:
    """Call a side for the first time, and describe the first result that is wrong; None if all are right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*a training batch of one sample")  # some cases are one sample on purpose
        results = _results(case, given, side)
    for name, want in expected(case).items():
        got = results[name]
        has_layout = name in ("y", "dx", "dresidual")
        if has_layout and got.dtype != DTYPES[case.dtype]:
            return f"{name} is {got.dtype}"
        if has_layout and not got.is_contiguous(memory_format=memory_format(case)):
            return f"{name} is not {case.layout}"
        error = (got.double() - want.value).abs()
        excess = error > want.tolerance
        excess |= error.isnan()
        if excess.any():
            at = int((error / want.tolerance).nan_to_num(torch.inf).argmax())
            largest, allowed = error.flatten()[at], want.tolerance.flatten()[at]
            return (
                f"{name} is {largest:.2g} off, more than rounding explains ({allowed:.2g}), "
                f"and wrong in {int(excess.sum())} elements"
            )
    return None
