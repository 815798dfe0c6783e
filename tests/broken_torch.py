"""Breaks one private name of torch at a time, and holds the library's numbers to torch's own in float64.

``python broken_torch.py CASES`` reads a JSON list of [path, way] and prints what went wrong in each, or null. Each case
runs in a fork, because the library looks a name up once per process. A name is broken where the library looks it up: a
torch that renames it would go on working itself.
"""

import json
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.torch_internals import lookup

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CHANNELS = 3


def raising(*_, **__):
    raise RuntimeError("this torch has changed")


def answering(*_, **__):
    return "an answer of another type"


def break_name(path, way):
    """Let the library find a private name missing, raising, or answering something else."""
    look_up = lookup.look_up

    def look_up_broken(asked):
        if asked != path:
            return look_up(asked)
        if way == "missing":
            raise AttributeError(path)
        return raising if way == "raises" else answering

    lookup.look_up = look_up_broken


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_layer(*, training, residual=False, mask=False):
    """Forward, backward and statistics of three steps, which are enough to make a plan and use it."""
    ours, exact = bn.BatchNorm1d(CHANNELS), nn.BatchNorm1d(CHANNELS).double()
    for layer in (ours, exact):
        layer.train(training)
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        x, other, dy = (randn(8, CHANNELS, 4, seed=3 * step + i) for i in range(3))
        counted = torch.arange(4) < torch.arange(8).unsqueeze(1) if mask else None
        given = x.clone().requires_grad_()
        y = ours(given, other if residual else None, counted)
        y.backward(dy)
        wide = x.double().requires_grad_()
        if mask:
            rows = counted.unsqueeze(1).expand_as(wide)
            flat = wide.movedim(1, -1)[counted]
            expected = torch.zeros_like(wide).movedim(1, -1)
            expected[counted] = exact(flat)
            expected = expected.movedim(-1, 1) + (other * rows if residual else 0)
        else:
            expected = exact(wide) + (other if residual else 0)
        expected.backward(dy.double())
        torch.testing.assert_close(y.double(), expected, **CLOSE)
        torch.testing.assert_close(given.grad.double(), wide.grad, **CLOSE)
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(ours, name).grad.double(), getattr(exact, name).grad, **CLOSE)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(exact, name), **CLOSE)
    assert ours.num_batches_tracked == exact.num_batches_tracked


def check_layers():
    for training in (True, False):
        check_layer(training=training)
        check_layer(training=training, residual=True)
        check_layer(training=training, residual=True, mask=True)


def check_checkpointing():
    """A forward that is run again updates statistics once, and renormalizes as it did at first."""
    for options in ({}, {"renorm": bn.Renorm(2.0, 1.0)}):
        plain, checkpointed = bn.BatchNorm1d(CHANNELS, **options), bn.BatchNorm1d(CHANNELS, **options)
        for step in range(3):
            once, again = (randn(8, CHANNELS, seed=step).requires_grad_() for _ in range(2))
            (plain(once) ** 3).sum().backward()
            (checkpoint(checkpointed, again, use_reentrant=False) ** 3).sum().backward()
            torch.testing.assert_close(once.grad, again.grad, **CLOSE)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(plain, name), getattr(checkpointed, name))


def check_transforms():
    """vmap, grad and jvp of `normalize`, and a second derivative through a layer."""
    x, weight, direction = randn(2, 8, CHANNELS), randn(CHANNELS, seed=1), randn(8, CHANNELS, seed=2)
    stats = bn.Stats(torch.zeros(CHANNELS), torch.ones(CHANNELS), torch.tensor(0))

    def exact(x):
        return nn.functional.batch_norm(x, None, None, weight.double(), None, True)

    def cubes(x):
        return (bn.normalize(x, stats, weight)[0] ** 3).sum()

    y = torch.func.vmap(lambda x: bn.normalize(x, stats, weight)[0])(x)
    torch.testing.assert_close(y.double(), torch.stack([exact(each.double()) for each in x]), **CLOSE)
    x = x[0]
    wide = x.double().requires_grad_()
    (first,) = torch.autograd.grad((exact(wide) ** 3).sum(), wide, create_graph=True)
    torch.testing.assert_close(torch.func.grad(cubes)(x).double(), first, **CLOSE)
    tangent = torch.func.jvp(cubes, (x,), (direction,))[1]
    torch.testing.assert_close(tangent.double(), (first * direction).sum(), **CLOSE)

    layer = bn.BatchNorm1d(CHANNELS)
    layer.weight.data.copy_(weight)
    given = x.clone().requires_grad_()
    (ours,) = torch.autograd.grad((layer(given) ** 3).sum(), given, create_graph=True)
    second = [
        torch.autograd.grad((each * direction).sum(), of)[0].double() for each, of in ((ours, given), (first, wide))
    ]
    torch.testing.assert_close(*second, rtol=1e-3, atol=1e-3)


def check_batched_gradients():
    layer, x, dy = bn.BatchNorm1d(CHANNELS), randn(8, CHANNELS).requires_grad_(), randn(2, 8, CHANNELS, seed=1)
    y = layer(x)
    (batched,) = torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)
    for each, expected in zip(dy, batched, strict=True):
        torch.testing.assert_close(torch.autograd.grad(y, x, each, retain_graph=True)[0], expected, **CLOSE)


def check_readers():
    """What else reads layers: statistics, traces and lazy layers."""
    layer, x = bn.BatchNorm1d(CHANNELS), randn(16, CHANNELS)
    bn.recalibrate(nn.Sequential(layer), [x[:8], x[8:]])
    torch.testing.assert_close(layer.running_mean, x.mean(0), **CLOSE)
    traced = torch.jit.trace(layer.eval(), x)
    torch.testing.assert_close(traced(x), layer(x), **CLOSE)
    lazy = bn.LazyBatchNorm1d()
    torch.testing.assert_close(lazy(x), bn.BatchNorm1d(CHANNELS)(x))


def check_sync():
    """Two processes have one mean and variance."""
    folder = tempfile.mkdtemp()
    ranks = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os._exit(run_rank(rank, folder))
        ranks.append(child)
    assert [os.waitpid(child, 0)[1] for child in ranks] == [0, 0]


def run_rank(rank, folder):
    try:
        torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
        x = randn(8, CHANNELS)
        ours, exact = bn.BatchNorm1d(CHANNELS, sync=True), nn.BatchNorm1d(CHANNELS).double()
        mine, wide = x[4 * rank : 4 * rank + 4].clone().requires_grad_(), x.double().requires_grad_()
        (ours(mine) ** 3).sum().backward()
        (exact(wide) ** 3).sum().backward()
        torch.testing.assert_close(mine.grad.double(), wide.grad[4 * rank : 4 * rank + 4], **CLOSE)
        torch.testing.assert_close(ours.running_var.double(), exact.running_var, **CLOSE)
        torch.distributed.destroy_process_group()
    except BaseException:  # noqa: BLE001 (the parent reads the status)
        traceback.print_exc()
        return 1
    return 0


CHECKS = [check_layers, check_checkpointing, check_transforms, check_batched_gradients, check_readers]


def failures(path, way):
    break_name(path, way)
    found = []
    for check in [check_sync] if "distributed" in path or "c10d" in path else CHECKS:
        try:
            check()
        except Exception:  # noqa: BLE001 (it is reported)
            found.append(traceback.format_exc(limit=-4))
    return "\n".join(found) or None


def run(path, way):
    """Run a case in a fork."""
    answer = Path(tempfile.mkdtemp()) / "answer"
    child = os.fork()
    if child == 0:
        try:
            answer.write_text(json.dumps(failures(path, way)))
        except BaseException:  # noqa: BLE001 (it is reported)
            answer.write_text(json.dumps(traceback.format_exc(limit=-4)))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return json.loads(answer.read_text()) if answer.exists() else f"it ended with status {status}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's own, of its older parts
    torch.set_num_threads(1)
    torch.func.grad(torch.sum)(torch.zeros(1))  # torch imports its compiler here, once for all forks
    sys.stdout.write(json.dumps([run(*case) for case in json.loads(sys.argv[1])]))
