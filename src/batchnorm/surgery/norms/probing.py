"""The formula of a batch normalization layer with a forward of its own, measured on a copy in float64.

The copy gets random parameters and running statistics, and each of its children is replaced by a recorder, which shows
where the child runs, and on what. Its outputs in eval and in train mode, and its running statistics after training
batches, must be those of batch normalization.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.surgery.opening import deep_copy
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["Formula", "Probe", "Run", "accepted_dims", "is_close", "stays_in_eval", "told"]

ACTIVATIONS: tuple[nn.Module | None, ...] = (
    None,
    nn.ReLU(),
    nn.LeakyReLU(),
    nn.SiLU(),
    nn.GELU(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.ReLU6(),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.GELU("tanh"),
    nn.ELU(),
    nn.SELU(),
    nn.Mish(),
    nn.Softplus(),
    nn.Hardtanh(),
)
"""The activations that are found in the forward of a layer, the most frequent first."""

TENSORS = ("running_mean", "running_var", "weight", "bias")
DIMS = {frozenset({2, 3}): 1, frozenset({4}): 2, frozenset({5}): 3}
CHANNELS = 3
"""Channels of a probe, unless the layer has other tensors than those of batch normalization."""

SIZES = (6, 5, 2, 2, 2)
"""Sizes of a probe's input: the samples, then those after the channels."""


@dataclass(frozen=True, eq=False)
class Formula:
    """Batch normalization as a layer computes it.

    Attributes
    ----------
    dims : int or None
        1, 2 or 3, as in BatchNorm1d, 2d and 3d; None for other numbers of dimensions.
    eps : float
    frozen : bool
        The running statistics are used in training too, and never updated.
    children : tuple of str
        The names of the children that run one after the other behind the normalization.
    activation : Module or None
        A new module that computes what the forward itself does last.
    """

    dims: int | None
    eps: float
    frozen: bool
    children: tuple[str, ...] = ()
    activation: nn.Module | None = None


_Behind = tuple[tuple[str, ...], nn.Module | None]
"""The children and the activation that run behind the normalization."""


class Run(NamedTuple):
    """A forward of the probe: the recorded calls of children, each with its input, and the output."""

    calls: list[tuple[str, Tensor, Tensor]]
    y: Tensor


class _Recorder(nn.Module):
    """Stands for a child: records its input, and returns values that nothing else could give."""

    def __init__(self, name: str, calls: list[tuple[str, Tensor, Tensor]]) -> None:
        super().__init__()
        self.name, self.calls = name, calls
        self.random = torch.Generator().manual_seed(0)  # of its own, so that a forward's own draws show

    def forward(self, x: Tensor) -> Tensor:
        y = 3 * torch.randn(x.shape, dtype=x.dtype, generator=self.random)  # of both signs, where a ReLU behind shows
        if x.requires_grad:
            y = y + (x - x.detach())  # the same values, with a gradient
        self.calls.append((self.name, x.clone(), y.clone()))
        return y


class _Local(nn.SyncBatchNorm):
    """SyncBatchNorm without the exchange between processes, which a probe must not begin."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
        return TorchBatchNorm.forward(self, input)


def accepted_dims(layer: TorchBatchNorm) -> int | str | None:
    """Return the dims, as in `Formula`, that a layer with torch's forward accepts, or a reason if it accepts none."""
    accepted = set()
    for dims in range(2, 6):
        try:
            shape = [1, max(layer.num_features, 1), *[1] * (dims - 2)]
            layer._check_input_dim(torch.empty(shape, device="meta"))  # type: ignore[no-untyped-call]
        except Exception:  # noqa: BLE001 (whatever the check of a subclass raises)
            continue
        accepted.add(dims)
    return _dims(accepted) if accepted else "it accepts no input of 2 to 5 dimensions"


def stays_in_eval(module: nn.Module) -> bool:
    """Return whether ``train()`` leaves a module in eval mode, by a method of its own."""
    if type(module).train is nn.Module.train:
        return False
    twin = deep_copy(module)
    twin.train()
    return not twin.training


class Probe:
    """A copy of a layer, to be run on random inputs."""

    def __init__(self, module: nn.Module) -> None:
        self.calls: list[tuple[str, Tensor, Tensor]] = []
        self.original = module
        recorders = {child: _Recorder(name, self.calls) for name, child in module.named_children()}
        self.copy = deep_copy(module, recorders)
        if isinstance(module, nn.SyncBatchNorm):
            self.copy.__class__ = type(type(module).__name__, (type(module), _Local), {})
        fewer = not any(values.dim() for name, values in _tensors(module) if name not in TENSORS)
        stores: list[dict[str, Any]] = [self.copy._parameters, self.copy._buffers, vars(self.copy)]
        for store in stores:
            for name, values in [*store.items()]:
                if isinstance(values, Tensor):
                    store[name] = _drawn(name, values, CHANNELS if fewer else None)
        if fewer and "num_features" in vars(self.copy):
            vars(self.copy)["num_features"] = CHANNELS

    def formula(self) -> Formula | str:
        """Return the formula, or the reason why it is not that of batch normalization."""
        found: dict[int, Formula | str] = {}
        for dims in range(2, 6):
            try:
                found[dims] = self.formula_for(dims)
            except Exception:
                if dims == 5 and not found:
                    raise
        known = {dims: each for dims, each in found.items() if isinstance(each, Formula)}
        if not known:
            return next(str(each) for each in found.values())
        first, *others = known.values()
        if any(_key(other) != _key(first) for other in others):
            return "its own forward computes something else for other numbers of dimensions"
        return Formula(_dims(set(known)), first.eps, first.frozen, first.children, first.activation)

    def formula_for(self, dims: int) -> Formula | str:
        """Return the formula for inputs of so many dimensions."""
        x = 3 * torch.randn(SIZES[0], self.channels(), *SIZES[1 : dims - 1], dtype=torch.float64) + 1
        eps = getattr(self.original, "eps", None)
        self.copy.eval()
        far = torch.cat((x, 1000 * x[:1]))  # where a clamp shows
        run = self.run(far)
        if not isinstance(eps, float | int):
            eps = self._inferred_eps(far, run)
            if eps is None:
                return "it has no eps, and none explains its outputs"
        with torch.enable_grad():
            self.run(x.clone().requires_grad_())  # detectron2's takes another number of dimensions with gradients
        in_eval = self.behind(self.normalized(far, float(eps), training=self.lacks_statistics()), run, ACTIVATIONS)
        if isinstance(in_eval, str):
            return f"{in_eval} in eval mode"
        try:
            frozen = self._is_frozen(x, float(eps), in_eval)
            reasons = [] if frozen else [self._trains_otherwise(x + i, float(eps), in_eval) for i in range(2)]
        except Exception as error:  # noqa: BLE001 (whatever its forward raises)
            return f"its own forward cannot be run by itself in train mode ({told(error)})"
        return next(filter(None, reasons), Formula(dims, float(eps), frozen, *in_eval))

    def run(self, x: Tensor) -> Run:
        """Run the forward of the copy on an input, which it may overwrite."""
        self.calls.clear()
        y = self.copy.forward(x.clone())
        if not isinstance(y, Tensor) or y.shape != x.shape:
            raise TypeError("it returns no tensor of the shape of the input")
        return Run([*self.calls], y)

    def _is_frozen(self, x: Tensor, eps: float, in_eval: _Behind) -> bool:
        """Return whether the layer uses its running statistics in train mode, and leaves them as they are."""
        self.copy.train()
        if self.lacks_statistics():
            return False
        buffers = [(values, values.clone()) for values in self.copy.buffers()]
        z = self.normalized(x, eps, training=False)
        behind = self.behind(z, self.run(x), [in_eval[1]])
        unchanged = all(torch.equal(values, before) for values, before in buffers)
        for values, before in buffers:
            values.copy_(before)
        return unchanged and not isinstance(behind, str)

    def _trains_otherwise(self, x: Tensor, eps: float, in_eval: _Behind) -> str:
        """Train on a batch, and return how that differs from batch normalization; empty if it does not."""
        counted = self.batches()
        batches = 1 if counted is None else counted + 1
        statistics = None if self.lacks_statistics() else self.statistics()
        tracks = getattr(self.copy, "track_running_stats", True) and statistics is not None
        run = self.run(x)
        z = self.normalized(x, eps, training=True)
        behind = self.behind(z, run, [in_eval[1]])
        if isinstance(behind, str):
            return f"{behind} in train mode"
        if behind[0] != in_eval[0]:
            return "its children do not run alike in train and in eval mode"
        if statistics is not None and tracks:
            momentum = getattr(self.copy, "momentum", None)
            weight = 1 / batches if momentum is None else momentum
            mean, var = statistics
            F.batch_norm(x, mean, var, training=True, momentum=weight)
            if counted is not None and self.batches() != batches:
                return "it counts its batches in another way"
        if statistics is not None and not all(map(is_close, self.statistics(), statistics)):
            return "it updates its running statistics in another way"
        return ""

    def normalized(self, x: Tensor, eps: float, *, training: bool) -> Tensor:
        """Return the input after torch's batch normalization with the tensors of the copy."""
        mean, var = (None, None) if training else self.statistics()
        weight, bias = (getattr(self.copy, name, None) for name in ("weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, training, 0.0, eps)

    def behind(self, z: Tensor, run: Run, known: Sequence[nn.Module | None]) -> _Behind | str:
        """Return the children that run behind z, and the activation that the forward computes after them."""
        last = z
        for name, x, y in run.calls:
            if not is_close(x, last):
                return f"its child {name} does not run on the normalized values"
            last = y
        names = tuple(name for name, *_ in run.calls)
        for activation in known:
            if is_close(run.y, last if activation is None else activation(last)):
                return names, copy.deepcopy(activation)
        return "its own forward computes something else than batch normalization and an activation"

    def _inferred_eps(self, x: Tensor, run: Run) -> float | None:
        """Return the eps that explains the largest output, to 9 digits."""
        mean, var = self.statistics()
        y = run.calls[0][1] if run.calls else run.y
        weight, bias = (getattr(self.copy, name, None) for name in ("weight", "bias"))
        shape = (1, -1, *[1] * (x.dim() - 2))
        gamma = torch.ones_like(mean) if weight is None else weight
        beta = torch.zeros_like(mean) if bias is None else bias
        above = (y - beta.view(shape)).flatten()
        at = int(above.argmax())
        ratio = (gamma.view(shape) * (x - mean.view(shape))).flatten()[at] / above[at]
        eps = float(ratio**2 - var.view(shape).expand_as(x).flatten()[at])
        return float(f"{eps:.8e}") if 0 <= eps < 1 else None

    def lacks_statistics(self) -> bool:
        """Return whether it always normalizes with the statistics of the batch."""
        return any(getattr(self.copy, name, None) is None for name in ("running_mean", "running_var"))

    def statistics(self) -> list[Tensor]:
        """Return copies of the running mean and variance."""
        return [getattr(self.copy, name).clone() for name in ("running_mean", "running_var")]

    def batches(self) -> int | None:
        """Return its count of batches."""
        counted = self.copy._buffers.get("num_batches_tracked")
        return None if counted is None else int(counted)

    def channels(self) -> int:
        """Return the channels of an input."""
        sized = (getattr(self.copy, name, None) for name in (*TENSORS[2:], *TENSORS[:2]))
        return next(
            (len(values) for values in sized if isinstance(values, Tensor)), getattr(self.copy, "num_features", 3)
        )


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the tensors of a layer, without those of its children."""
    named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False), *vars(module).items())
    return [(name, values) for name, values in named if isinstance(values, Tensor)]


def _drawn(name: str, values: Tensor, channels: int | None) -> Tensor:
    """Return random values for a tensor of a probe, on the CPU, of so many channels if that is given."""
    shape = values.shape if channels is None or not values.dim() else (channels,)
    if not values.is_floating_point():
        return torch.zeros(shape, dtype=values.dtype)
    drawn = torch.randn(shape, dtype=torch.float64)
    if name == "running_var":
        drawn = drawn.abs() + 0.5
    elif name == "weight":
        drawn = 8 * drawn  # so that the output of training batches goes far too
    return nn.Parameter(drawn) if isinstance(values, nn.Parameter) else drawn


def is_close(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors are equal to rounding, NaN where the other is."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


def _dims(accepted: set[int]) -> int | None:
    return DIMS.get(frozenset(accepted))


def told(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")


def _key(formula: Formula) -> tuple[object, ...]:
    return formula.eps, formula.frozen, formula.children, repr(formula.activation)
