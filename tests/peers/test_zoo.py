"""A dozen models of the zoo (benchmarks/zoo.py) through every operation, and how it compares."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import ROOT, benchmark_script, peer, randn

pytestmark = pytest.mark.peers

EVERY_LAYER = ("convert", "to_torch")
MODELS = {  # and the least number of batch norms that fold reaches
    "own/unet": 17,
    "own/wavenet": 12,
    "own/volume": 4,
    "own/shared_norm": 1,
    "own/reused_norm": 2,
    "own/untraceable": 2,
    "own/siamese": 3,
    "own/plain": 4,
    "timm/test_resnet": 15,
    "timm/test_efficientnet": 13,
    "torchvision/mobilenet_v3_small": 34,
    "transformers/detr": 16,
}


@pytest.fixture
def zoo(monkeypatch):
    for library in ("torchvision", "timm", "transformers"):
        peer(library)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return benchmark_script("zoo")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same_after_every_operation(name, zoo):
    row = zoo.measure(name, zoo.available())
    faults = {operation: found["faults"] for operation, found in row["operations"].items() if "faults" in found}
    assert faults == {}
    assert all(row["operations"][operation]["done"] == row["norms"] for operation in EVERY_LAYER)
    folded = row["operations"]["fold"]
    assert folded.get("done_on_example", folded["done"]) >= MODELS[name]


class Wrong(nn.Module):
    """A network, whose batch norm an operation of a test gets wrong."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


def with_another_eps(model, _):
    made, report = bn.convert(model)
    made.norm.eps = 2e-5
    return made, report


def with_a_changed_original(model, _):
    model.norm.running_mean += 1e-12
    return bn.convert(model)


@pytest.mark.parametrize(
    ("operation", "fault"), [(with_another_eps, "differs by"), (with_a_changed_original, "has changed")]
)
def test_the_checks_of_the_zoo_see_a_wrong_operation(operation, fault, zoo, monkeypatch):
    import zoo_checks

    monkeypatch.setitem(zoo_checks.OPERATIONS, "convert", operation)
    found = zoo_checks.check(Wrong(), (randn(2, 3, 8, 8),), ["convert"])
    assert any(fault in text for text in found["convert"].faults)


def test_a_chaotic_network_is_told_from_a_wrong_operation(zoo):
    import zoo_checks

    class Chaotic(Wrong):
        def forward(self, x):
            return torch.sin(1e9 * super().forward(x))

    (outcome,) = zoo_checks.check(Chaotic(), (randn(2, 3, 8, 8),), ["convert"]).values()
    assert outcome.faults == []
    assert outcome.rounding["float32"] > 0.1
