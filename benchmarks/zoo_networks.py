"""Hand-written networks of the zoo: structures that the libraries have rarely or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NETWORKS", "Example"]

Example = tuple[Tensor, ...] | dict[str, Tensor]
"""An input: positional or keyword arguments of a model."""


def images(*shape: int) -> tuple[Tensor, ...]:
    """Return two random samples of a shape."""
    return (torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)),)


class UNet(nn.Module):
    """A U-Net with transposed convolutions on the way up and concatenated skip connections."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            self.block(3 if not level else widths[level - 1], widths[level]) for level in range(depth)
        )
        self.bottom = self.block(widths[-2], widths[-1])
        self.up = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(2 * w, w, 2, 2), nn.BatchNorm2d(w), nn.ReLU(inplace=True))
            for w in reversed(widths[:-1])
        )
        self.merge = nn.ModuleList(self.block(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Sequential:
        """Return two convolutions, each with batch norm and ReLU."""
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return two values per pixel."""
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        result: Tensor = self.head(x)
        return result


class WaveNet(nn.Module):
    """Gated, dilated, causal convolutions over sequences, with residual and skip connections."""

    class Block(nn.Module):
        """A gated convolution with batch norm."""

        def __init__(self, width: int, dilation: int) -> None:
            super().__init__()
            self.padding = dilation
            self.filter = nn.Conv1d(width, width, 2, dilation=dilation, bias=False)
            self.gate = nn.Conv1d(width, width, 2, dilation=dilation, bias=False)
            self.filter_norm, self.gate_norm = nn.BatchNorm1d(width), nn.BatchNorm1d(width)
            self.residual, self.skip = nn.Conv1d(width, width, 1), nn.Conv1d(width, width, 1)
            self.norm = nn.BatchNorm1d(width)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            """Return the input of the next block, and what goes to the head."""
            padded = F.pad(x, (self.padding, 0))
            hidden = self.filter_norm(self.filter(padded)).tanh() * self.gate_norm(self.gate(padded)).sigmoid()
            return F.relu(self.norm(self.residual(hidden)) + x), self.skip(hidden)

    def __init__(self, width: int = 16, dilations: tuple[int, ...] = (1, 2, 4, 8)) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, width, 1)
        self.blocks = nn.ModuleList(self.Block(width, dilation) for dilation in dilations)
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return four values per step of the sequence."""
        x = self.start(x)
        total = 0
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        result: Tensor = self.head(total)
        return result


class Volume(nn.Module):
    """A residual network of 3-d convolutions, with one transposed convolution."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(1, width, 3, padding=1, bias=False), nn.BatchNorm3d(width)
        self.conv2, self.bn2 = nn.Conv3d(width, width, 3, padding=1, groups=2), nn.BatchNorm3d(width)
        self.conv3, self.bn3 = nn.Conv3d(width, 2 * width, 3, stride=2), nn.BatchNorm3d(2 * width, affine=False)
        self.up, self.bn4 = nn.ConvTranspose3d(2 * width, width, 2, 2, groups=2), nn.BatchNorm3d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return a volume of features."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        x = F.leaky_relu(self.bn3(self.conv3(x)), 0.01)
        result: Tensor = F.elu(self.bn4(self.up(x)))
        return result


class SharedNorm(nn.Module):
    """One batch norm layer under two names, called once by each."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(width)
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), norm, nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), norm, nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of features."""
        result: Tensor = self.head(self.second(self.first(x)))
        return result


class ReusedNorm(nn.Module):
    """A convolution and a batch norm layer that are called three times, as an unrolled recurrence does."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.start = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU())
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of features."""
        x = self.start(x)
        for _ in range(3):
            x = torch.relu(self.norm(self.conv(x)))
        return x


class Untraceable(nn.Module):
    """A network whose forward depends on the values of its input, with one block that can be read."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.other, self.other_norm = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of features; the sign of the first value decides how."""
        x = self.block(x)
        if x.flatten()[0] >= 0:
            return F.relu(self.norm(self.conv(x)))
        return self.other_norm(self.other(x))


class Preactivation(nn.Module):
    """Batch norm before the convolution, as in ResNet v2 and DenseNet."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.start = nn.Conv2d(3, width, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.bn3, self.conv3 = nn.BatchNorm2d(2 * width), nn.Conv2d(2 * width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of features."""
        x = self.start(x)
        x = x + self.conv1(F.relu(self.bn1(x)))
        new = self.conv2(F.relu(self.bn2(x), inplace=True))
        result: Tensor = self.conv3(self.bn3(torch.cat([x, new], 1)))
        return result


class Siamese(nn.Module):
    """One encoder for two inputs, so that each of its layers is called twice."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, width)
        )
        self.head = nn.Sequential(nn.BatchNorm1d(2 * width), nn.Linear(2 * width, 3), nn.BatchNorm1d(3, affine=False))

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """Return the scores of a pair."""
        return {"scores": self.head(torch.cat([self.encoder(a), self.encoder(b)], 1))}


def plain() -> nn.Module:
    """Return a convolutional network with one activation module that is used everywhere, and a batch norm on (N, C)."""
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), relu),
        *(nn.Conv2d(8, 8, 3, groups=4, padding="same"), nn.BatchNorm2d(8, eps=1e-3, momentum=None), relu),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Hardswish()),
        *(nn.Linear(16, 8), nn.ReLU6(), nn.BatchNorm1d(8), nn.Linear(8, 4)),
    )


def sequence() -> nn.Module:
    """Return a network over (N, L, C) in which batch norm sees the sequence as channels: a Linear before it differs."""
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(5))


def vectors() -> tuple[Tensor, ...]:
    """Return two batches of eight vectors."""
    return tuple(torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


NETWORKS: dict[str, tuple[Callable[[], Any], Callable[[], tuple[Tensor, ...]]]] = {
    "unet": (UNet, lambda: images(3, 32, 32)),
    "wavenet": (WaveNet, lambda: images(1, 64)),
    "volume": (Volume, lambda: images(1, 9, 9, 9)),
    "shared_norm": (SharedNorm, lambda: images(3, 16, 16)),
    "reused_norm": (ReusedNorm, lambda: images(3, 16, 16)),
    "untraceable": (Untraceable, lambda: images(3, 16, 16)),
    "preactivation": (Preactivation, lambda: images(3, 16, 16)),
    "siamese": (Siamese, vectors),
    "plain": (plain, lambda: images(3, 16, 16)),
    "sequence": (sequence, lambda: images(5, 6)),
}
"""Networks by name, each with a function that builds it and one that returns an input."""
