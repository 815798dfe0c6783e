"""Helpers that several test files share: ``from support import randn``."""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm as bn

ROOT = Path(__file__).parents[1]

# Marks


def compiles(test):
    """Mark a test that compiles a model, and ignore the deprecation warnings that torch.compile itself causes."""
    return pytest.mark.compile(pytest.mark.filterwarnings("ignore::DeprecationWarning")(test))


unconverged = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
"""Mark a test whose fits are too short to converge."""


needs_torchs_bias = pytest.mark.skipif(
    "bias" not in inspect.signature(nn.BatchNorm1d).parameters, reason="the layers of this torch take no bias="
)


def skip_or_fail(reason):
    """Skip the running test because the machine lacks a tool; in CI, where every tool is installed, fail it."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def peer(name):
    """Import a library of the extra ``peers``, without its warnings; where it is missing, skip the test or fail it."""
    if importlib.util.find_spec(name) is None:
        skip_or_fail(f"{name} is not installed; make installs it with the extra peers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "+cpu" in torch.__version__:
            _declare_operators_of_torchvision()
        return importlib.import_module(name)


@functools.cache
def _declare_operators_of_torchvision():
    """Declare two operators of torchvision, which stop its import where its kernels need a CUDA build of torch."""
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# Tensors


def randn(*shape, seed=0, dtype=torch.float32):
    """Draw standard normal values from a generator of their own.

    Dtypes of less precision get the float32 values, rounded.
    """
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=drawn).to(dtype)


def with_layout(x, layout):
    """Return the values of x (N, C, *) in a memory layout: "contiguous", "channels last" or "expanded".

    "channels last" stores the channels next to each other, and leaves (N, C) as it is; "expanded" repeats the first
    value along the last dimension with a stride of 0.
    """
    if layout == "expanded":
        return x[..., :1].expand_as(x)
    if layout == "contiguous" or x.dim() == 2:
        return x.contiguous()
    if layout != "channels last":
        raise ValueError(f"layout must be 'contiguous', 'channels last' or 'expanded'; got {layout!r}")
    if x.dim() == 3:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def reduced_dims(x):
    """Return the dimensions of x (N, C, *) that batch normalization reduces: all but the channels."""
    return [d for d in range(x.dim()) if d != 1]


def by_channel(values, x):
    """Reshape values (C,) so that they broadcast against x (N, C, *)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def full_mask(x, mask):
    """Expand a mask (N, *) to the shape of x (N, C, *); None is a mask of ones."""
    return torch.ones_like(x, dtype=torch.bool) if mask is None else mask.unsqueeze(1).expand_as(x)


def largest_excess(found, expected, bound):
    """Return the largest error in units of the error allowed; NaN if any value is NaN.

    Allowed is ``bound`` plus the rounding of the dtype in which ``found`` is stored.
    """
    rounding = torch.finfo(found.dtype)
    stored = rounding.eps / 2 * expected.abs() + rounding.smallest_normal * rounding.eps
    return ((found.double() - expected).abs() / (bound + stored)).max() if found.numel() else torch.tensor(0.0)


class PassThroughMode(TorchDispatchMode):
    """A dispatch mode that changes nothing. While it is active, layers call operators rather than the kernels."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


# Models


def norm_layers(model):
    """Return the batch norm layers of a model, ours and torch's."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, bn.BatchNorm)
    return [layer for layer in model.modules() if isinstance(layer, kinds)]


def network_with_domains(kind, *between):
    """Return a float64 network of 2 features, whose stored statistics no data gave.

    Layers of ours have the domains "a" and "b". The modules ``between`` stand after the first layer.
    """
    torch.manual_seed(0)
    model = nn.Sequential(kind(2), *between, nn.Linear(2, 2), kind(2)).double()
    if kind is bn.BatchNorm1d:
        bn.add_domains(model, ["a", "b"])
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    return model


def trained(model, shape):
    """Return the model in eval mode, with statistics, gamma and beta other than those of a new layer."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        for _ in range(5):
            model(torch.randn(shape, generator=generator) * 2 + 1)
    return model.eval()


def mixed_network(dropout=0.5):
    """Return a float64 network from 4 to 3 features with layers of ours and torch's, with unbiased and biased variance.

    Its running statistics are the initial ones, which are far from those of any data.
    """
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6),
        bn.BatchNorm1d(6, activation="relu"),
        nn.Dropout(dropout),
        nn.Linear(6, 5),
        nn.BatchNorm1d(5, momentum=None),
        nn.Tanh(),
        nn.Linear(5, 3),
        bn.BatchNorm1d(3, unbiased=False),
    ).double()


def copied_buffers(module):
    """Return copies of the buffers of a module by name."""
    return {name: values.clone() for name, values in module.named_buffers()}


def copied_state(module):
    """Return copies of the state of a module by name."""
    return {name: values.clone() for name, values in module.state_dict().items()}


def assert_same_buffers(module, before):
    """Compare the buffers of a module with ``before``, as `copied_buffers` gave it, bit by bit."""
    assert_same_state(copied_buffers(module), before)


def changed_names(before, module):
    """Return the names of ``before``, as `copied_state` gave it, whose values in the module differ now."""
    now = module.state_dict()
    return [name for name, values in before.items() if not torch.equal(values, now[name])]


def assert_same_state(found, expected):
    """Compare two dictionaries of tensors: same names, dtypes and values, bit by bit, NaN included."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        torch.testing.assert_close(found[name], values, rtol=0, atol=0, equal_nan=True, msg=name)


def saved_and_loaded(value, **options):
    """Return the value after a round trip through torch.save and torch.load, which takes the options."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


# Estimators


def network_arrays(estimator):
    """Return the parameters and running statistics of a fitted estimator's network by name."""
    return {name: values.numpy() for name, values in estimator.network_.state_dict().items()}


def assert_same_network(estimator, other, *, atol=0.0):
    """Compare the networks of two fitted estimators, by default for equality."""
    ours, theirs = network_arrays(estimator), network_arrays(other)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], rtol=0, atol=atol, err_msg=name)


# The command line


def run_command(*arguments, cwd=".", status=0, columns=80):
    """Run ``batchnorm ARGUMENTS`` in this process, in a folder, and check its exit status.

    Returns ``stdout`` and ``stderr``.
    """
    from batchnorm.cli import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(cwd):
        patch.setattr(sys, "argv", ["batchnorm", *map(str, arguments)])
        patch.setenv("COLUMNS", str(columns))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
    assert (ended.value.code or 0) == status, err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def usage_error(*arguments, cwd="."):
    """Run a command that must exit with status 2 and print one sentence, and return the sentence."""
    done = run_command(*arguments, cwd=cwd, status=2)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


# Benchmarks and their results


def benchmark_script(name):
    """Import ``benchmarks/NAME.py``."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def benchmark_results(name):
    """Read the committed results ``benchmarks/results/NAME.json``."""
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


# Pages in a browser


class PageVisit:
    """A page open in a browser: the requests it makes, and the errors, dialogs and console messages it causes."""

    def __init__(self, browser, path, *, width=1280, **options):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.page = self.context.new_page()
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.open(path)

    def open(self, path):
        """Load a page, and forget what the page before it caused."""
        self.complaints.clear()
        self.requests.clear()
        self.page.goto(path.as_uri())

    def violations(self, axe_source):
        """Return the accessibility faults that axe-core finds: rule, impact and elements."""
        self.page.evaluate(axe_source)
        found = self.page.evaluate("axe.run()")["violations"]
        return [(fault["id"], fault["impact"], [node["target"] for node in fault["nodes"]]) for fault in found]


def run_json(run):
    """Return the content of a run's run.json, read without the library."""
    return json.loads((run.folder / "run.json").read_text())
