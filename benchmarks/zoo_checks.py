"""The checks of the zoo: each operation on a model, and its outputs beside those of the model as it was."""

from __future__ import annotations

import copy
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo_models import call, tensors
from zoo_networks import Example

import batchnorm as bn

__all__ = ["OPERATIONS", "Outcome", "check", "norm_layers", "randomize"]

FLOAT32, FLOAT64 = 1e-4, 1e-9
MARGIN = 16
CHAOTIC = 1e-3
STEPS = 3
SAMPLES = 8

Operation = Callable[[nn.Module, Example], tuple[nn.Module, Any]]
OPERATIONS: dict[str, Operation] = {
    "convert": lambda model, _: bn.convert(model),
    "to_torch": lambda model, _: bn.to_torch(bn.convert(model)[0]),
    "accelerate": lambda model, _: bn.accelerate(model),
    "fold": lambda model, _: bn.fold(model),
    "tune": lambda model, _: bn.tune(model),
}
"""The operations, without an example."""

ON_EXAMPLE: dict[str, Operation] = {
    "accelerate": lambda model, example: bn.accelerate(model, example),
    "fold": lambda model, example: bn.fold(model, example),
    "tune": lambda model, example: bn.tune(model, example),
}
"""Operations that read on an example what they could not read without; tried where they have left layers for that."""


@dataclass
class Outcome:
    """What an operation did to a model.

    Attributes
    ----------
    done : int
        Batch norm layers that were converted, fused, folded or tuned.
    after : dict of int
        What stands in their place, and how often.
    left : dict of int
        The reasons why layers were left alone, and how often.
    done_on_example : int or None
        The same as ``done`` with an example; None if none was needed.
    seconds : float
        Time of the operation in float32.
    float32, float64, train : float or None
        Largest relative difference of the outputs; with ``train``, of the outputs, gradients and statistics of three
        training steps in float64. None where it was not compared.
    rounding : dict of float
        Where a difference is above its tolerance: how much the model as it was changes by one rounding per batch norm.
    samples : int or None
        Samples of the training steps, where two were too few: batch norm of two values per channel has outputs of 1 and
        -1, and its gradients are rounding alone.
    faults : list of str
        What is wrong.
    """

    done: int = 0
    after: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    done_on_example: int | None = None
    seconds: float = 0.0
    float32: float | None = None
    float64: float | None = None
    train: float | None = None
    rounding: dict[str, float] = field(default_factory=dict)
    samples: int | None = None
    faults: list[str] = field(default_factory=list)


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the batch norm layers of a model by path, frozen ones too."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm | bn.BatchNorm) or "FrozenBatchNorm" in type(module).__name__
    }


def randomize(model: nn.Module, example: Example) -> None:
    """Give a new model parameters and statistics as after training, so that no term of a formula is trivial.

    Constant parameters (gamma, beta, biases, layer scales) are perturbed. The running statistics become those of the
    example and are perturbed, so that values in eval mode have the same scale as in train mode.
    """
    generator = torch.Generator().manual_seed(7)

    def normal(of: Tensor) -> Tensor:
        return torch.randn(of.shape, generator=generator).to(of.dtype)

    norms = norm_layers(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter += 0.2 * normal(parameter)
        momenta = {
            module: module.momentum for module in norms.values() if getattr(module, "momentum", None) is not None
        }
        for module in momenta:
            module.momentum = 1.0
        model.train()
        torch.manual_seed(0)
        call(model, example)
        for module, momentum in momenta.items():
            module.momentum = momentum
        for module in norms.values():
            if getattr(module, "running_var", None) is None:
                continue
            if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):  # frozen: weight is a buffer
                for name in ("weight", "bias"):
                    if name in module._buffers:
                        getattr(module, name).add_(0.2 * normal(getattr(module, name)))
            module.running_mean += 0.2 * module.running_var.sqrt() * normal(module.running_mean)
            module.running_var *= (0.3 * normal(module.running_var)).exp()
    model.eval()


# Runs

Values = dict[str, Tensor]


def outputs(model: nn.Module, example: Example) -> Values:
    """Return the outputs of a model in eval mode."""
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        return {f"output {i}": value for i, value in enumerate(tensors(call(model, example)))}


def steps(model: nn.Module, example: Example, number: int = STEPS) -> Values:
    """Train a model, and return the outputs of every step, and the gradients and statistics after the last."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    found: Values = {}
    for step in range(number):
        torch.manual_seed(step)
        results = [value for value in tensors(call(model, example)) if value.requires_grad]
        found |= {f"output {i} of step {step}": value.detach() for i, value in enumerate(results)}
        loss = sum(((value - 1) ** 2).mean() for value in results)
        for parameter in parameters.values():
            parameter.grad = None
        loss.backward()  # type: ignore[union-attr]
        gradients = {name: value.grad for name, value in parameters.items() if value.grad is not None}
        if step == number - 1:
            break
        length = sum(gradient.square().sum() for gradient in gradients.values()) ** 0.5
        with torch.no_grad():
            for name, gradient in gradients.items():
                parameters[name] -= 1e-2 / max(float(length), 1.0) * gradient
    found |= {f"gradient of {name}": value for name, value in gradients.items()}
    return found | {name: value for name, value in model.named_buffers() if "running_" in name}


def difference(found: Values, expected: Values) -> tuple[float, str]:
    """Return the largest relative difference and the name of its tensor.

    The difference of a tensor is the largest one of its elements, relative to its largest element. Gradients that are
    zero but for rounding, as of a bias before batch norm, are relative to a thousandth of the largest gradient.
    """
    if found.keys() != expected.keys():
        return float("inf"), f"{sorted(found.keys() ^ expected.keys())[0]}, which is on one side only"
    largest = max(
        (float(value.abs().max()) for name, value in expected.items() if "gradient" in name and value.numel()),
        default=0.0,
    )
    worst = (0.0, "")
    for name, want in expected.items():
        got = found[name]
        if got.shape != want.shape:
            return float("inf"), f"{name}, of shape {tuple(got.shape)} rather than {tuple(want.shape)}"
        if not want.numel():
            continue
        scale = max(float(want.abs().max()), 1e-3 * largest if "gradient" in name else 0.0, 1e-300)
        off = float((got.to(want.dtype) - want).abs().max()) / scale
        if not off <= worst[0]:
            worst = (off, name)
    return worst


def perturbed(model: nn.Module) -> nn.Module:
    """Return a copy in which the output of every batch norm is off by one rounding, up or down at random."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)

    def perturb(_: nn.Module, __: object, output: Tensor) -> Tensor:
        up = torch.randint(2, output.shape, generator=generator, dtype=output.dtype)
        return output * (1 + torch.finfo(output.dtype).eps * (2 * up - 1))

    for module in norm_layers(model).values():
        module.register_forward_hook(perturb)
    return model


def prepared(what: str, model: nn.Module) -> nn.Module:
    """Return the model, whose batch norm layers use their running statistics in train mode if ``what`` is "frozen"."""
    if what == "frozen":
        for module in norm_layers(model).values():
            module.train = lambda mode=True, module=module: module  # type: ignore[assignment,misc]
            module.training = False
    return model


# Checks


@dataclass
class Bench:
    """A model as it was in one dtype, and what it computes."""

    model: nn.Module
    example: Example
    briefly: bool = False
    results: dict[str, Values] = field(default_factory=dict)
    sensitivity: dict[str, float] = field(default_factory=dict)
    larger: list[Bench] = field(default_factory=list)

    def run(self, what: str, model: nn.Module) -> Values:
        """Run a model: "eval", or steps of "train" or, where the statistics are frozen, "frozen"."""
        if what == "eval":
            return outputs(model, self.example)
        return steps(model.train(), self.example, STEPS if what == "train" else 1)

    def expected(self, what: str) -> Values:
        """Return what the model as it was computes."""
        if what not in self.results:
            self.results[what] = self.run(what, prepared(what, copy.deepcopy(self.model)))
        return self.results[what]

    def with_more_samples(self) -> Bench:
        """Return a bench of the same model with more samples, the same at every call."""
        if not self.larger:
            generator = torch.Generator().manual_seed(2)
            drawn = [
                torch.randn(SAMPLES, *value.shape[1:], generator=generator, dtype=value.dtype)
                for value in cast_tensors(self.example)
            ]
            more = dict(zip(self.example, drawn, strict=True)) if isinstance(self.example, dict) else tuple(drawn)
            self.larger.append(Bench(self.model, more))
        return self.larger[0]

    def by_rounding(self, what: str) -> float:
        """Return the largest relative difference that one rounding per batch norm makes to the model as it was."""
        if what not in self.sensitivity:
            self.sensitivity[what] = difference(
                self.run(what, prepared(what, perturbed(self.model))), self.expected(what)
            )[0]
        return self.sensitivity[what]


def cast(example: Example, dtype: torch.dtype) -> Example:
    """Return an example in a dtype."""
    if isinstance(example, dict):
        return {name: value.to(dtype) for name, value in example.items()}
    return tuple(value.to(dtype) for value in example)


def general(reason: str) -> str:
    """Return a reason without paths and numbers, so that equal reasons can be counted."""
    reason = re.sub(r"\b[A-Za-z_]\w*(\.\w+)+\b", "PATH", reason)
    return re.sub(r"\b\d+\b", "N", reason)


def check(model: nn.Module, example: Example, operations: list[str], *, briefly: bool = False) -> dict[str, Outcome]:
    """Run operations on a model, and compare what it computes before and after; the model gets random statistics.

    Briefly means in float64 and eval mode only.
    """
    randomize(model, example)
    found = {name: Outcome() for name in operations}
    for dtype in (torch.float64,) if briefly else (torch.float32, torch.float64):
        model = model.to(dtype)
        bench = Bench(model, cast(example, dtype), briefly)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        for name in operations:
            attempt(name, found[name], bench)
            now = model.state_dict()
            if now.keys() != state.keys() or not all(_same(now[key], state[key]) for key in state):
                found[name].faults.append("the model given has changed")
                return found
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def attempt(name: str, outcome: Outcome, bench: Bench) -> None:
    """Run one operation in one dtype, and write its outcome."""
    double = next(iter(cast_tensors(bench.example))).dtype == torch.float64
    if double and outcome.faults:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            begun = time.perf_counter()
            made, report = OPERATIONS[name](bench.model, bench.example)
            seconds = time.perf_counter() - begun
            if bench.briefly or not double:
                outcome.seconds = round(seconds, 3)
                describe(name, outcome, report, bench)
            compare(name, outcome, bench, made, double=double)
    except Exception as error:  # noqa: BLE001 (an error of any kind is a fault of the operation)
        outcome.faults.append(f"{'float64' if double else 'float32'}: {type(error).__name__}: {error}"[:400])


def cast_tensors(example: Example) -> list[Tensor]:
    """Return the tensors of an example."""
    return list(example.values()) if isinstance(example, dict) else list(example)


def reached(report: Any) -> int:
    """Return how many layers an operation changed; accelerate's report also has those that it only converted."""
    return len({layer.path for layer in report.layers} - {layer.path for layer in getattr(report, "left", ())})


def describe(name: str, outcome: Outcome, report: Any, bench: Bench) -> None:
    """Count the layers of a report."""
    outcome.done = reached(report)
    outcome.after = dict(Counter(layer.after for layer in report.layers))
    left = getattr(report, "left", ())
    outcome.left = dict(Counter(general(layer.reason) for layer in left))
    expected = norm_layers(bench.model)
    told = {layer.path for layer in (*report.layers, *left)}
    if missing := [path for path in expected if path not in told and name != "to_torch"]:
        outcome.faults.append(f"{len(missing)} layers are not in the report, the first at {missing[0]}")
    if name in ON_EXAMPLE and any("cannot be" in reason or "example" in reason for reason in outcome.left):
        made, again = ON_EXAMPLE[name](bench.model, bench.example)
        outcome.done_on_example = reached(again)
        off, where = difference(outputs(made, bench.example), bench.expected("eval"))
        if not off <= FLOAT32:
            outcome.faults.append(f"with an example: {where} differs by {off:.2g}")


def compare(name: str, outcome: Outcome, bench: Bench, made: nn.Module, *, double: bool) -> None:
    """Compare what the models compute before and after an operation."""
    if name in ("convert", "accelerate", "tune") and (differing := _names(made) ^ _names(bench.model)):
        outcome.faults.append(f"{len(differing)} names of the state dict differ, the first {sorted(differing)[0]}")
    dtype = "float64" if double else "float32"
    compare_runs(dtype, "eval", outcome, bench, made)
    if double and not bench.briefly and name in ("convert", "accelerate", "tune"):
        what = "frozen" if name == "tune" else "train"
        start = copy.deepcopy(made.state_dict())
        chaotic = compare_runs("train", what, outcome, bench, made)
        if chaotic and what == "train":
            made.load_state_dict(start)
            outcome.samples = SAMPLES
            compare_runs("train", what, outcome, bench.with_more_samples(), made)


def compare_runs(column: str, what: str, outcome: Outcome, bench: Bench, made: nn.Module) -> bool:
    """Compare one kind of run, and return whether the model is chaotic in it: whether rounding changes it visibly."""
    off, where = difference(bench.run(what, made), bench.expected(what))
    setattr(outcome, column, float(f"{off:.2g}"))
    outcome.rounding.pop(column, None)
    if off <= (FLOAT32 if column == "float32" else FLOAT64):
        return False
    rounding = outcome.rounding[column] = float(f"{bench.by_rounding(what):.2g}")
    if rounding > CHAOTIC:
        return True
    if not off <= MARGIN * rounding:
        outcome.faults.append(f"{column}: {where} differs by {off:.2g}, and by rounding {rounding:.2g}")
    return False


def _names(model: nn.Module) -> set[str]:
    """Return the names of the state dict; frozen layers of other libraries do not count batches, and ours do."""
    return {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}


def as_record(found: dict[str, Outcome]) -> dict[str, dict[str, Any]]:
    """Return outcomes as JSON, without what is empty."""
    return {
        name: {key: value for key, value in asdict(outcome).items() if value not in ({}, [], None)}
        for name, outcome in found.items()
    }
