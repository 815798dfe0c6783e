"""`fold` on whole networks, as they are and after other operations."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from support import randn


class Double(nn.Sequential):
    """Two convolutions, each with batch norm and an in-place ReLU."""

    def __init__(self, into, out):
        super().__init__(
            nn.Conv2d(into, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=1),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """One level of a U-Net (Ronneberger et al. 2015), which scales up by a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.down, self.bottom, self.top = Double(3, 4), Double(4, 8), Double(8, 4)
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 4, 2, 2), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        skip = self.down(x)
        return self.head(self.top(torch.cat([skip, self.up(self.bottom(F.max_pool2d(skip, 2)))], 1)))


class WaveNet(nn.Module):
    """Gated causal convolutions with growing dilation (van den Oord et al. 2016)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(1, 4, 1)
        self.gates = nn.ModuleList([nn.Conv1d(4, 8, 2, dilation=2**i) for i in range(3)])
        self.outs = nn.ModuleList([nn.Conv1d(4, 4, 1) for _ in range(3)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(8) for _ in range(3)])
        self.norms_out = nn.ModuleList([nn.BatchNorm1d(4) for _ in range(3)])

    def forward(self, x):
        x = skips = self.stem(x)
        for i in range(3):
            a, b = self.norms[i](self.gates[i](F.pad(x, (2**i, 0)))).chunk(2, 1)
            y = self.norms_out[i](self.outs[i](a.tanh() * b.sigmoid()))
            x, skips = x + y, skips + y
        return skips


class Siamese(nn.Module):
    """One branch for two inputs."""

    def __init__(self):
        super().__init__()
        self.branch = Double(3, 4)

    def forward(self, x):
        return self.branch(x) - self.branch(x.flip(3))


NETWORKS = {
    "U-Net": (UNet, (2, 3, 8, 8), 7),
    "WaveNet": (WaveNet, (2, 1, 12), 6),
    "siamese": (Siamese, (2, 3, 5, 5), 2),
    "3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ConvTranspose3d(4, 2, 2), nn.BatchNorm3d(2)),
        (2, 1, 4, 4, 4),
        2,
    ),
}

OPERATIONS = {
    "as it is": lambda model, x: model,
    "converted": lambda model, x: bn.convert(model)[0],
    "accelerated": lambda model, x: bn.accelerate(model, x)[0],
    "tuned": lambda model, x: bn.tune(model)[0],
    "of torch again": lambda model, x: bn.to_torch(bn.convert(model)[0])[0],
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_batch_norm_of_a_network_is_folded(name, operation):
    make, shape, count = NETWORKS[name]
    torch.manual_seed(0)
    model, x = make().double(), randn(*shape, dtype=torch.float64)
    with torch.no_grad():
        for i, values in enumerate(model.parameters()):
            values += 0.2 * randn(*values.shape, seed=i)
        for seed in range(3):
            model(x + 2 * randn(*shape, seed=seed))
    model.eval()
    folded, report = bn.fold(OPERATIONS[operation](model, x), x)
    assert (len(report.layers), len(report.left)) == (count, 0), str(report)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-11)
