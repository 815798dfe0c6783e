"""Layers in training mode through torch.export and other recorders: gradients, statistics, saved programs."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import SplitPoint, pipeline
from torch.export import Dim, draft_export, export

import batchnorm as bn
from support import ROOT, randn

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")  # torch's warnings about its own functions
    for message in (
        ".*LeafSpec:FutureWarning",
        ".*deprecated:DeprecationWarning",
        ".*is deprecated.*:FutureWarning",
        "Exception ignored in.*_io.FileIO",
    )
]
# float64 sums of about 20 numbers of order 1, in another order and through three steps
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


class Network(nn.Module):
    """Two layers, the second with a residual."""

    def __init__(self, kind=bn.BatchNorm1d, **options):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.one, self.other = kind(3, **options), kind(3, **options)

    def forward(self, x, **named):
        y = self.one(self.first(x), **named).tanh()
        return self.other(self.second(y), **named) + y


class WithResidual(Network):
    def forward(self, x):
        return self.other(self.second(x), residual=self.one(self.first(x)))


def network(kind=bn.BatchNorm1d, **options):
    return Network(kind, **options).double().train()


def through_a_file(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


def namespaces(program):
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {target.namespace for target in targets if hasattr(target, "namespace")}


def batch_norms(graph):
    return [str(node.target) for node in graph.nodes].count("aten.batch_norm.default")


def step(model, x, *masks):
    """Return outputs, gradients and buffers of a step of training, which it takes."""
    x = x.clone().requires_grad_()
    for parameter in model.parameters():
        parameter.grad = None
    y = model(x, *masks)
    (y * torch.linspace(0, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = {"y": y.detach(), "x": x.grad} | {name: values.grad for name, values in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    return found | {name: values.clone() for name, values in model.named_buffers()}


def assert_trains_alike(found, expected, sizes=(8, 8, 8), mask=None):
    """Train two models on the same batches; a graph may lack the buffers that it does not use."""
    for i, samples in enumerate(sizes):
        x = randn(samples, 3, seed=i, dtype=torch.float64) * 2 + i
        masks = [] if mask is None else [torch.arange(samples) % mask != 0]
        mine, theirs = step(found, x, *masks), step(expected, x, *masks)
        buffers = dict(expected.named_buffers())
        theirs = {name: value for name, value in theirs.items() if name in mine or name not in buffers}
        torch.testing.assert_close(mine, theirs, **CLOSE)


LIKE_TORCHS = {
    "defaults": {},
    "activation": {"activation": "gelu"},
    "no bias": {"bias": False},
    "no statistics": {"track_running_stats": False},
    "small_batch": {"small_batch": "running"},
    "propagate": {"nonfinite": "propagate"},
}
OTHERS = {
    "momentum=None": {"momentum": None},
    "biased": {"unbiased": False},
    "virtual batches": {"virtual_batch_size": 3},
    "renorm": {"renorm": bn.Renorm(2.0, 1.0)},
    "schedule": {"renorm": bn.RenormSchedule()},
}


@pytest.mark.parametrize("options", LIKE_TORCHS.values(), ids=LIKE_TORCHS)
def test_a_saved_training_export_trains_as_the_model_does(options):
    model = network(**options)
    program = through_a_file(export(copy.deepcopy(model), (randn(8, 3).double(),)))
    assert namespaces(program) == {"aten"}
    assert batch_norms(program.graph) == 2
    assert_trains_alike(program.module(), model)


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_options_that_torch_has_not_are_exported_in_torchs_operators(options):
    model = network(**options)
    program = through_a_file(export(copy.deepcopy(model), (randn(8, 3).double(),)))
    assert namespaces(program) == {"aten"}
    assert_trains_alike(program.module(), model)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"virtual_batch_size": 3}], ids=str)
@pytest.mark.parametrize("strict", [False, True], ids=["strict=False", "strict=True"])
def test_a_training_export_keeps_the_batch_size_open(strict, options):
    model = network(**options)
    shapes = ({0: Dim("n", min=5)},)
    x = randn(8, 3).double()
    program = through_a_file(export(copy.deepcopy(model), (x,), strict=strict, dynamic_shapes=shapes))
    assert ("batchnorm" in namespaces(program)) == ("virtual_batch_size" in options)
    assert_trains_alike(program.module(), model, sizes=(8, 5, 13))


@pytest.mark.parametrize("options", [{}, {"renorm": bn.Renorm(2.0, 1.0)}, {"virtual_batch_size": 3}], ids=str)
@pytest.mark.parametrize("strict", [False, True], ids=["strict=False", "strict=True"])
def test_a_training_export_takes_a_mask(strict, options):
    class Masked(Network):
        def forward(self, x, mask):
            return super().forward(x, mask=mask)

    model = Masked(**options).double()
    x, n = randn(8, 3).double(), Dim("n", min=5)
    shapes = {"x": {0: n}, "mask": {0: n}}
    program = export(copy.deepcopy(model), (x, torch.arange(8) % 3 != 0), strict=strict, dynamic_shapes=shapes)
    assert_trains_alike(through_a_file(program).module(), model, sizes=(8, 11), mask=3)


def test_a_training_export_keeps_the_residual_and_the_channels_dimension():
    model = WithResidual(channel_dim=-1, kind=bn.BatchNorm, activation="relu").double()
    program = export(copy.deepcopy(model), (randn(8, 3).double(),))
    assert batch_norms(program.graph) == 2
    assert_trains_alike(program.module(), model)


@pytest.mark.parametrize("options", [{}, *OTHERS.values()], ids=["defaults", *OTHERS])
def test_draft_export_records_a_model_in_training(options):
    model = network(**options)
    program = draft_export(copy.deepcopy(model), (randn(8, 3).double(),))
    assert_trains_alike(through_a_file(program).module(), model)


def test_a_training_export_of_a_bfloat16_layer_has_float32_statistics():
    model = bn.BatchNorm1d(3).bfloat16()
    exported = export(copy.deepcopy(model), (torch.ones(8, 3, dtype=torch.bfloat16),)).module()
    x = randn(8, 3, dtype=torch.bfloat16)
    # bfloat16 has 8 bits: two roundings of the same number may fall on both sides of it, 2**-8 of it apart
    torch.testing.assert_close(exported(x), model(x), rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(exported.running_var, model.running_var, rtol=1e-5, atol=1e-6)


# The statistics that an export uses and updates.


@pytest.mark.parametrize(("options", "skips"), [({}, False), ({"momentum": None}, True)], ids=["torch's", "other"])
def test_a_graph_of_torchs_batch_norm_alone_takes_a_batch_that_is_not_finite(options, skips):
    exported = export(bn.BatchNorm1d(3, **options), (randn(8, 3),)).module()
    exported(torch.full((8, 3), torch.inf))
    assert bool(exported.running_mean.isfinite().all()) == skips


def test_a_frozen_layer_stays_frozen_in_a_training_export():
    model = network()
    model(randn(8, 3).double() + 1)
    bn.freeze(model, affine=True)
    exported = export(copy.deepcopy(model), (randn(8, 3).double(),)).module()
    assert_trains_alike(exported, model)
    assert torch.equal(exported.one.running_mean, model.one.running_mean)


def test_a_training_export_within_a_domain_trains_that_domain():
    model = bn.add_domains(network(), ["drawn"])
    with bn.use_domain(model, "drawn"):
        exported = export(model, (randn(8, 3).double(),)).module()
        expected = copy.deepcopy(model)
    exported(randn(8, 3).double())
    assert torch.equal(exported.one.running_mean, torch.zeros(3))
    with bn.use_domain(expected, "drawn"):
        expected(randn(8, 3).double())
    torch.testing.assert_close(exported.one.running_mean_drawn, expected.one.running_mean_drawn, **CLOSE)


def test_a_training_export_within_no_stat_updates_updates_none():
    model = network()
    with bn.no_stat_updates(model):
        exported = export(model, (randn(8, 3).double(),)).module()
    expected, before = step(copy.deepcopy(model), randn(8, 3).double()), copy.deepcopy(model.state_dict())
    found = step(exported, randn(8, 3).double())
    torch.testing.assert_close(found["x"], expected["x"], **CLOSE)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(exported.state_dict()[f"one.{name}"], before[f"one.{name}"])


def test_torch_export_within_accumulate_is_refused():
    model = network()
    with bn.accumulate(model), pytest.raises(bn.UnsupportedError, match="export outside of it"):
        export(model, (randn(8, 3).double(),))


def test_exporting_in_training_leaves_the_statistics_of_the_model_as_they_were():
    model = network()
    before = copy.deepcopy(model.state_dict())
    export(model, (randn(8, 3).double(),))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# Another process, and tools that build on torch.export.

LOADS = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
y = program(torch.randn(8, 3, dtype=torch.float64))
y.square().sum().backward()
print(sum(parameter.grad is not None for parameter in program.parameters()), "batchnorm" in sys.modules)
"""


@pytest.mark.parametrize("options", [{}, {"renorm": bn.Renorm(2.0, 1.0)}, {"virtual_batch_size": 3}], ids=str)
def test_a_process_without_the_library_loads_and_trains_a_program(options, tmp_path):
    torch.export.save(export(network(**options), (randn(8, 3).double(),)), tmp_path / "program.pt2")
    command = [sys.executable, "-W", "ignore", "-c", LOADS, str(tmp_path / "program.pt2")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ | {"CI": ""})
    assert ran.stdout.split() == ["8", "False"]


def test_the_stages_of_a_pipeline_have_the_gradients_of_the_model():
    def stages(kind):
        torch.manual_seed(0)
        layers = nn.Linear(3, 4), kind(4), nn.ReLU(), nn.Linear(4, 4), kind(4)
        pipe = pipeline(nn.Sequential(*layers), (randn(8, 3),), split_spec={"3": SplitPoint.BEGINNING})
        return nn.Sequential(*[pipe.get_stage_module(i) for i in range(pipe.num_stages)])

    x = randn(8, 3)
    found, expected = step(stages(bn.BatchNorm1d), x), step(stages(nn.BatchNorm1d), x)
    torch.testing.assert_close({name: found[name] for name in expected}, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [bn.BatchNorm2d, nn.BatchNorm2d], ids=["ours", "torch's"])
def test_torchs_joint_export_has_a_gradient_for_every_parameter(kind):
    from torch.export.experimental import _export_forward_backward

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Conv2d(3, 4, 1), kind(4))

        def forward(self, x):
            return self.model(x).square().sum()

    program = _export_forward_backward(export(Loss(), (randn(2, 3, 5, 5),)))
    assert len(program.graph_signature.backward_signature.gradients_to_parameters) == 4
