"""Batches are moved to the model's device: run on a second device that refuses the tensors of the first."""

import json
import subprocess
import sys

import pytest

from support import ROOT

CODE = """
import collections, json, sys
sys.path.insert(0, "tests")
import second_device
import torch
from torch import nn
import batchnorm as bn
from batchnorm.lab.serving.served import Served
from batchnorm.lab.serving.shift import TableRows, examine

second_device.register()
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
x = torch.randn(64, 4, generator=generator)
result = {}


def network(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), bn.BatchNorm1d(6, activation="relu"), nn.Linear(6, 5), nn.BatchNorm1d(5))
    return model.eval().to(device)


def digest(found, model):
    return [found.to_dict(), [values.cpu().double().sum().item() for values in model.buffers()]]


def adapted(model, loader, **options):
    with bn.adapt(model, loader, **options) as found:
        return digest(found, model)


CALLS = {
    "recalibrate": lambda model, loader, **options: digest(bn.recalibrate(model, loader, **options), model),
    "at once": lambda model, loader, **options: digest(
        bn.recalibrate(model, loader, mode="at_once", **options), model),
    "adapt": adapted,
    "detect_shift": lambda model, loader, **options: digest(
        bn.detect_shift(model, loader, reference=loader, **options), model),
    "served": lambda model, loader: digest(examine(
        Served(model, lambda rows: torch.as_tensor(rows, dtype=torch.float32), None),
        TableRows(x.double().numpy(), x[:, 0].gt(0).long().numpy()), prior=16, alpha=0.05, reference_samples=256
    ), model),
}
KINDS = {
    "tensors": (lambda rows: rows, {}),
    "tuples": (lambda rows: (rows, rows[:, 0]), {}),
    "nested": (lambda rows: {"input": [rows], "y": rows}, {"forward": lambda model, batch: model(batch["input"][0])}),
}
for name, call in CALLS.items():
    for kind, (wrap, options) in KINDS.items():
        if (name, kind) in (("served", "tuples"), ("served", "nested")):
            continue
        loader = [wrap(rows) for rows in x.split(16)]
        result[f"{name}, {kind}"] = [call(network(device), loader, **options) for device in ("cpu", "second")]

def adapted_to_itself(device):
    model = network(device)
    with bn.adapt(model):
        return model(x.to(device)).cpu().tolist()


result["each batch"] = [adapted_to_itself(device) for device in ("cpu", "second")]
try:
    bn.recalibrate(network("second"), x.split(16), device="cpu")
except RuntimeError as error:
    result["forced"] = str(error)
there = [rows.to("second") for rows in x.split(16)]
result["back"] = [bn.recalibrate(network("cpu"), loader).to_dict() for loader in (x.split(16), there)]
print(json.dumps(result))
"""

NAMES = [
    f"{name}, {kind}"
    for name in ("recalibrate", "at once", "adapt", "detect_shift", "served")
    for kind in ("tensors", "tuples", "nested")
    if name != "served" or kind == "tensors"
]


@pytest.fixture(scope="module")
def found():
    """Return what every function gave, with the model on the CPU and with it on the second device."""
    run = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_a_loader_on_the_cpu_serves_a_model_on_another_device(found, name):
    on_cpu, on_second = found[name]
    assert on_second == on_cpu


def test_batches_on_another_device_are_adapted_to_by_themselves(found):
    on_cpu, on_second = found["each batch"]
    assert on_second == [pytest.approx(row, abs=1e-6) for row in on_cpu]  # the device has no fused kernel


def test_a_loader_on_another_device_serves_a_model_on_the_cpu(found):
    on_cpu, moved = found["back"]
    assert moved == on_cpu


def test_device_decides_where_batches_go(found):
    assert "expected all tensors to be on second:0" in found["forced"]
