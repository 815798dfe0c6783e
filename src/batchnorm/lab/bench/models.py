"""Whole training steps of known networks on the CPU, with torch's layers and with ours in their place.

The networks are those of `transformers`, built from their configurations with random weights: nothing is fetched.
What is swapped is what a user would swap by hand: a batch norm and the ReLU after it become one layer, and in a
residual block the last batch norm takes the addition and the ReLU that follow. MobileNetV2 has ReLU6, which isn't
fused, so there only the layers change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.lab.bench.run import Job, Settings, across_allocators
from batchnorm.lab.bench.share import share_of_batch_norm
from batchnorm.nn import BatchNorm2d

__all__ = ["LAYOUTS", "MODELS", "differences", "model_job", "network", "step_of", "swapped"]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
IMAGE = 224
CORNER = 96
LEARNING_RATE = 1e-4
MARGIN = 16


def network(name: str, **configuration: Any) -> nn.Module:
    """A network of `MODELS` with random weights, its configuration changed where keywords say so.

    Raises
    ------
    InputError
        transformers is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as missing:
        raise InputError(f"--models needs pip install 'batchnorm[bench]'; {missing.name} is not installed") from None
    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{"num_labels": 1000} | settings | configuration)
    torch.manual_seed(0)
    built: nn.Module = getattr(transformers, f"{kind}ForImageClassification")(config)
    return built.train()


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet50": ("ResNet", {}),
    "mobilenetv2": ("MobileNetV2", {"classifier_dropout_prob": 0.0}),  # dropout is random: losses must be equal
}


def swapped(model: nn.Module) -> nn.Module:
    """A copy with our layers, its numbers the same."""
    model = copy.deepcopy(model)
    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(getattr(module, "normalization", None), nn.BatchNorm2d):
            stock = module.normalization
            fuse = isinstance(getattr(module, "activation", None), nn.ReLU)
            ours = BatchNorm2d(stock.num_features, stock.eps, activation="relu" if fuse else None)
            ours.momentum = stock.momentum  # MobileNetV2's 0.997 is Keras's convention, of which the layer would warn
            ours.load_state_dict(stock.state_dict())
            module.normalization = ours
            if fuse:
                module.activation = nn.Identity()
    for module in modules:
        if type(module).__name__ in ("ResNetBottleNeckLayer", "ResNetBasicLayer"):
            module.layer[-1].normalization.activation = "relu"
            module.forward = MethodType(_block, module)
    return model


def _block(self: Any, input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
    """What a residual block of transformers calculates, its addition and ReLU left to the last batch norm."""
    *first, last = self.layer
    hidden = input
    for layer in first:
        hidden = layer(hidden)
    result: Tensor = last.normalization(last.convolution(hidden), self.shortcut(input))
    return result


def _laid_out(model: Any, layout: str) -> nn.Module:
    model.to(memory_format=LAYOUTS[layout])
    return model  # type: ignore[no-any-return]


def batch_of(size: int, layout: str, image: int = IMAGE, classes: int = 1000) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, image, image, generator=generator)
    labels = torch.randint(classes, (size,), generator=generator)
    return images.contiguous(memory_format=LAYOUTS[layout]), labels


def _logits_and_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    model = copy.deepcopy(model).to(images.dtype)  # a copy, so that its statistics are left as they were
    outputs = model(pixel_values=images, labels=labels)
    outputs.loss.backward()
    gradients = {
        f"the gradient of {name}": p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None
    }
    return {"the logits": outputs.logits.detach()} | gradients


def _shaken(model: nn.Module, rounding: float) -> nn.Module:
    """A copy in which every batch norm's output is moved, at random up or down, by one rounding."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)

    def shake(module: nn.Module, _: object, output: Tensor) -> Tensor:
        up = torch.randint(2, output.shape, generator=generator, dtype=output.dtype)
        return output * (1 + rounding * (2 * up - 1))

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(shake)
    return model


def _far(model: nn.Module, ours: nn.Module, images: Tensor, labels: Tensor) -> str | None:
    rounding = torch.finfo(images.dtype).eps
    nets = (model, _shaken(model, rounding), ours)
    expected, shaken, got = (_logits_and_gradients(net, images, labels) for net in nets)
    if got.keys() != expected.keys():
        return f"{sorted(got.keys() ^ expected.keys())[0]} is in one network alone"
    if images.dtype == torch.float32:
        expected, shaken, got = (
            {"the logits": values.pop("the logits"), "the gradient": torch.cat(list(values.values()))}
            for values in (expected, shaken, got)
        )
    for name, want in expected.items():
        allowed = MARGIN * ((shaken[name] - want).norm() + rounding * want.norm())
        error = (got[name] - want).norm()
        if not error <= allowed:
            return f"{name}, {images.dtype}: {float(error):.2g} off where rounding explains {float(allowed):.2g}"
    return None


def differences(model: nn.Module, ours: nn.Module, images: Tensor, labels: Tensor) -> str | None:
    """Where the logits, and so the loss, or the gradient of ours are not the stock network's; None if nowhere.

    Rounding grows on its way through a network by a factor that nobody knows in advance, so it is measured: how far
    the stock network's own logits and gradients go (Euclidean norm) when every batch norm errs by one rounding. Ours
    may differ by 16 of those, and by 16 roundings of the number itself. Rounding also puts a few elements on the other
    side of ReLU's kink, which is a jump in some parameters' gradients: so they are compared one by one in float64,
    on two images' corners, where that does not happen, and all together in float32.
    """
    return _far(model, ours, images[:2, :, :CORNER, :CORNER].double(), labels[:2]) or _far(model, ours, images, labels)


def step_of(name: str, layout: str, batch: int, side: str) -> Callable[[], object]:
    """A training step of a network: forward, loss, backward, gradient descent."""
    model = _laid_out(network(name), layout)
    if side == "ours":
        model = swapped(model)
    images, labels = batch_of(batch, layout)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()

    return step


def _measure(name: str, layout: str, batch: int, settings: Settings) -> dict[str, Any]:
    model = _laid_out(network(name), layout)
    described = {"name": f"{name}/{layout}/batch {batch}", "model": name, "layout": layout, "batch": batch}
    wrong = differences(model, swapped(model), *batch_of(batch, layout))
    del model
    if wrong is not None:
        return described | {"fault": wrong}
    share = share_of_batch_norm(step_of(name, layout, batch, "torch"))
    times = across_allocators(step_of, name, layout, batch, seconds=settings.seconds)
    # What is neither batch norm, activation nor addition takes ours as long as torch.
    of_ours = 1 - (1 - share) * times["times_faster"]["median"]
    return described | {"fault": None, "share": {"torch": share, "ours": of_ours}} | times


def model_job(name: str, layout: str, batch: int, settings: Settings) -> Job:
    """Time a network."""
    return Job(f"{name}/{layout}", lambda: _measure(name, layout, batch, settings))
