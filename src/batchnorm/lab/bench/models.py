"""Training steps of whole networks on the CPU, with torch's layers and with ours.

The networks come from `transformers`, built from their configurations with random weights, so nothing is downloaded.
`accelerate` puts our layers in the place of torch's: a batch norm and the ReLU after it become one layer, and the last
batch norm of a residual block also takes the addition and the ReLU that follow. MobileNetV2 has ReLU6, which our layers
don't fuse, and code that torch.fx cannot trace, so only its batch norms are replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.extras import needs
from batchnorm.lab.bench.measure import time_across_allocators
from batchnorm.lab.bench.registry import Layout, ModelCase
from batchnorm.lab.bench.request import BenchSettings
from batchnorm.lab.bench.results import CaseResult, ModelTiming, Share
from batchnorm.lab.bench.share import share_of_batch_norm
from batchnorm.lab.bench.timing import Tick
from batchnorm.surgery import accelerate

__all__ = ["MODELS", "batch_of", "find_difference", "measure_model", "network", "step_of", "with_our_layers"]

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
IMAGE = 224
CORNER = 96
LEARNING_RATE = 1e-4
MARGIN = 16


def network(name: str, **configuration: Any) -> nn.Module:
    """Return a network of `MODELS` with random weights; keywords change its configuration.

    Raises
    ------
    MissingDependencyError
        transformers is not installed.
    """
    with needs("models=True", "bench"):
        import transformers
    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{"num_labels": 1000} | settings | configuration)
    torch.manual_seed(0)
    built: nn.Module = getattr(transformers, f"{kind}ForImageClassification")(config)
    return built.train()


MODELS: dict[str, tuple[str, dict[str, float]]] = {
    "resnet50": ("ResNet", {}),
    "mobilenetv2": ("MobileNetV2", {"classifier_dropout_prob": 0.0}),  # both networks must have the same loss
}


def with_our_layers(model: nn.Module) -> nn.Module:
    """Return an accelerated copy of the model."""
    return accelerate(model)[0]


def _stock_network(name: str, layout: Layout) -> nn.Module:
    model: Any = network(name)
    model.to(memory_format=FORMATS[layout])
    return model  # type: ignore[no-any-return]


def batch_of(size: int, layout: Layout, image: int = IMAGE, classes: int = 1000) -> tuple[Tensor, Tensor]:
    """Return random images and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, image, image, generator=generator)
    labels = torch.randint(classes, (size,), generator=generator)
    return images.contiguous(memory_format=FORMATS[layout]), labels


def _logits_and_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    model = copy.deepcopy(model).to(images.dtype)  # a copy, because the forward pass updates statistics
    outputs = model(pixel_values=images, labels=labels)
    outputs.loss.backward()
    gradients = {
        f"the gradient of {name}": p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None
    }
    return {"the logits": outputs.logits.detach()} | gradients


def _perturbed(model: nn.Module, rounding: float) -> nn.Module:
    """Return a copy in which the output of every batch norm is off by one rounding, up or down at random."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)

    def perturb(module: nn.Module, _: object, output: Tensor) -> Tensor:
        up = torch.randint(2, output.shape, generator=generator, dtype=output.dtype)
        return output * (1 + rounding * (2 * up - 1))

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(perturb)
    return model


def _difference(model: nn.Module, ours: nn.Module, images: Tensor, labels: Tensor) -> str | None:
    rounding = torch.finfo(images.dtype).eps
    networks = (model, _perturbed(model, rounding), ours)
    expected, perturbed, got = (_logits_and_gradients(network, images, labels) for network in networks)
    if got.keys() != expected.keys():
        return f"{sorted(got.keys() ^ expected.keys())[0]} is in one network only"
    if images.dtype == torch.float32:
        expected, perturbed, got = (
            {"the logits": values.pop("the logits"), "the gradient": torch.cat(list(values.values()))}
            for values in (expected, perturbed, got)
        )
    for name, want in expected.items():
        allowed = MARGIN * ((perturbed[name] - want).norm() + rounding * want.norm())
        error = (got[name] - want).norm()
        if not error <= allowed:
            return f"{name}, {images.dtype}: {float(error):.2g} off, more than rounding explains ({float(allowed):.2g})"
    return None


def find_difference(model: nn.Module, ours: nn.Module, images: Tensor, labels: Tensor) -> str | None:
    """Describe where the logits or the gradient differ between the stock network and ours; None if nowhere.

    A network amplifies rounding errors by a factor that can't be derived, so it is measured: by how much (Euclidean
    norm) the logits and gradients of the stock network change when every batch norm is off by one rounding. Ours may
    differ by 16 times that, plus 16 roundings of the number itself. Rounding also puts a few elements on the other side
    of ReLU's kink, where the gradients of some parameters jump. Therefore parameters are compared one by one in
    float64, on the corners of two images, where that does not happen, and all together in float32.
    """
    corners = images[:2, :, :CORNER, :CORNER].double()
    return _difference(model, ours, corners, labels[:2]) or _difference(model, ours, images, labels)


def step_of(case: ModelCase, side: str) -> Callable[[], object]:
    """Return a training step of a network: forward, loss, backward, gradient descent."""
    model = _stock_network(case.model, case.layout)
    if side == "ours":
        model = with_our_layers(model)
    images, labels = batch_of(case.batch, case.layout)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()

    return step


def measure_model(case: ModelCase, settings: BenchSettings, tick: Tick | None = None) -> CaseResult:
    """Time the training steps of a network, in new processes, with the allocator tuned and as it is."""
    model = _stock_network(case.model, case.layout)
    fault = find_difference(model, with_our_layers(model), *batch_of(case.batch, case.layout))
    del model
    if fault is not None:
        return CaseResult(case, fault=fault)
    torch_share = share_of_batch_norm(step_of(case, "torch"))
    timing = time_across_allocators(step_of, case, seconds=settings.seconds, tick=tick)
    # The rest of the step, without batch norm, activations and additions, takes ours as long as torch.
    share = Share(torch=torch_share, ours=1 - (1 - torch_share) * timing.speedup.median)
    return CaseResult(case, ModelTiming(**vars(timing), share=share))
