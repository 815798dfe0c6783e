"""The places of batch norm layers that were folded, and the refusal to train of all modules around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from batchnorm.errors import InputError, UnsupportedError
from batchnorm.surgery.derived import derive, has_change

__all__ = ["Folded", "become_folded", "refuse_training"]

SETTINGS = ("num_features", "eps", "momentum", "affine", "track_running_stats")


class Folded(nn.Module):
    """The place of a batch normalization layer that has become part of the layer before it, or of the next.

    It returns its input, plus the residual if there is one, through the activation that the layer had.
    """

    def __init__(self, dims: int, behind: Mapping[str, nn.Module], *, copies: bool = False) -> None:
        """Make the place of a layer.

        Parameters
        ----------
        dims : int
            The number of dimensions that an input must have; 0 for any.
        behind : mapping
            The modules that run behind the normalization, by name.
        copies : bool
            Return a copy of the input, which other code may change in place later.
        """
        super().__init__()
        self.dims, self.copies = dims, copies
        for name, module in behind.items():
            self.add_module(name, module)
        self.eval()

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002 (torch's name for it)
        """Return ``activation(input + residual)``. The mask must be None."""
        # TorchScript compiles one branch of a condition that asks for it, and knows no errors of ours.
        if is_scripting():
            if mask is not None or (self.dims != 0 and input.dim() != self.dims):
                raise ValueError("a folded layer takes no mask, and inputs of the dimensions it was folded for")
        else:
            self._check(input, mask)
        output = input.clone() if self.copies else input
        output = output if residual is None else output + residual
        for module in self.children():
            output = module(output)
        return output

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if mask is not None:
            raise UnsupportedError("a folded batch normalization layer takes no mask; fold the model with an example")
        if self.dims and isinstance(x, Tensor) and x.dim() != self.dims:
            raise InputError(
                f"a batch normalization layer was folded for inputs of {self.dims} dimensions, and normalizes those of "
                f"others otherwise; got shape {tuple(x.shape)}. Fold the model with an example of that shape, and the "
                "layer stays"
            )

    def train(self, mode: bool = True) -> Folded:
        """Set eval mode, or refuse to train."""
        if mode:
            raise_for_training()
        return super().train(mode)

    def extra_repr(self) -> str:
        """Return the number of dimensions that an input must have, and whether it is copied."""
        return ", ".join([f"dims={self.dims}"] * bool(self.dims) + ["copies=True"] * self.copies)


def become_folded(module: nn.Module, folded: Folded) -> None:
    """Turn a batch norm layer into `folded`, so that whoever has a reference to the layer calls that.

    Its settings stay, since the forward of the model may read them.
    """
    kept = {name: vars(module)[name] for name in SETTINGS if name in vars(module)}
    vars(module).clear()
    vars(module).update(kept | vars(folded))
    object.__setattr__(module, "__class__", Folded)


def refuse_training(model: nn.Module) -> None:
    """Let ``train()`` of all modules that have a folded layer below them raise an error before any mode is changed."""
    for module in model.modules():
        around = not isinstance(module, Folded) and any(isinstance(each, Folded) for each in module.modules())
        if around and not has_change(module, inference_alone):
            derive(module, inference_alone)


def inference_alone(own: type[nn.Module]) -> Mapping[str, Any]:
    """Return a method ``train`` that refuses training mode, for a class derived from ``own``."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        if mode:
            raise_for_training()
        return own.train(self, mode)

    return {"train": train}


def raise_for_training() -> NoReturn:
    raise UnsupportedError(
        "a folded model is for inference, since its batch normalization has become part of the weights, and training "
        "would go on without it; got train(). Train the model that it was folded from, and fold that again"
    )
