"""Batch renormalization under activation checkpointing: a recomputed forward uses the r and d of its first run."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import batchnorm as bn
from support import PassThroughMode, compiles, randn

MODES = [True, False]


def normal(shape, seed):
    return randn(*shape, seed=seed, dtype=torch.float64)


class Network(nn.Module):
    """A layer shared by two segments, another layer, and functions by which a wrong r or d shows in every gradient."""

    def __init__(self, renorm, **options):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.shared = bn.BatchNorm1d(5, momentum=0.5, renorm=renorm, **options)
        self.last = bn.BatchNorm1d(3, momentum=0.5, renorm=renorm, **options)
        self.double()

    def lower(self, x):
        return torch.sin(self.shared(self.first(x)))

    def upper(self, x):
        return torch.cos(self.last(self.third(torch.sin(self.shared(self.second(x))))))

    def forward(self, x):
        return self.upper(self.lower(x))


def segmented(mode):
    def forward(model, x):
        return checkpoint(model.upper, checkpoint(model.lower, x, use_reentrant=mode), use_reentrant=mode)

    return forward


def whole(mode):
    return lambda model, x: checkpoint(model, x, use_reentrant=mode)


def steps(model, forward, count=3):
    """Return the gradients and statistics of some steps."""
    found = []
    for seed in range(count):
        x = (normal((7, 4), seed) * (seed + 1) + seed).requires_grad_()
        model.zero_grad()
        y = forward(model, x)
        (y * torch.linspace(-1, 2, y.numel()).double().view_as(y)).sum().backward()
        found += [x.grad, *(p.grad.clone() for p in model.parameters())]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    return [*found, *(value.clone() for value in model.buffers())]


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        # the same float64 operations; only sums of gradients have another order
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


RENORMS = {
    "fixed": bn.Renorm(1.5, 0.5),
    "wide": bn.Renorm(100.0, 100.0),
    "a schedule": bn.RenormSchedule(3.0, 5.0, start=1, r_end=8, d_end=6),
}


@pytest.mark.parametrize("mode", MODES, ids=["reentrant", ""])
@pytest.mark.parametrize("wrapped", [whole, segmented], ids=["one segment", "two segments"])
@pytest.mark.parametrize("chunk", [None, 3], ids=["", "virtual"])
@pytest.mark.parametrize("renorm", RENORMS.values(), ids=RENORMS)
def test_a_recomputed_forward_uses_the_r_and_d_of_its_first_run(renorm, chunk, wrapped, mode):
    wanted = steps(Network(renorm, virtual_batch_size=chunk), nn.Module.__call__)
    assert_same(steps(Network(renorm, virtual_batch_size=chunk), wrapped(mode)), wanted)


def test_after_its_own_update_the_gradient_of_gamma_would_be_another():
    """Make sure that the test above can fail."""
    model, x = Network(RENORMS["wide"]), normal((7, 4), 0)
    first, again = (torch.autograd.grad(model(x).square().sum(), model.shared.weight)[0] for _ in range(2))
    assert (first - again).abs().max() > 1e-3


def gradient_of_gamma(forwards):
    """Return the gradient of gamma for a layer that each of the forwards calls on the same batch."""
    layer = bn.BatchNorm1d(4, momentum=0.5, renorm=RENORMS["wide"]).double()
    x = (normal((7, 4), 0) * 2 + 1).requires_grad_()
    losses = [(forward(layer, x) * normal((7, 4), i)).sum() for i, forward in enumerate(forwards)]
    sum(loss for loss in losses if loss.requires_grad).backward()
    return layer.weight.grad


def sine(layer, x):
    return torch.sin(torch.sin(layer(x)))


def checkpointed_sine(mode):
    return lambda layer, x: torch.sin(checkpoint(lambda z: torch.sin(layer(z)), x, use_reentrant=mode))


@pytest.mark.parametrize("mode", MODES, ids=["reentrant", ""])
def test_two_segments_that_get_the_same_batch_each_use_their_own(mode):
    assert_same([gradient_of_gamma([checkpointed_sine(mode)] * 2)], [gradient_of_gamma([sine] * 2)])


@pytest.mark.parametrize("mode", MODES, ids=["reentrant", ""])
def test_a_forward_without_a_gradient_on_the_same_batch_is_no_first_run(mode):
    found, wanted = (
        gradient_of_gamma([torch.no_grad()(forward), forward]) for forward in (checkpointed_sine(mode), sine)
    )
    assert_same([found], [wanted])


@pytest.mark.parametrize("mode", MODES, ids=["reentrant", ""])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first in, first out", "last in, first out"])
def test_two_forwards_before_their_backwards_each_use_their_own(order, mode):
    found = []
    for forward in (nn.Module.__call__, segmented(mode)):
        model = Network(RENORMS["wide"])
        losses = [forward(model, (normal((7, 4), seed) + seed).requires_grad_()).square().sum() for seed in (0, 1)]
        for i in order:
            losses[i].backward()
        found.append([p.grad for p in model.parameters()])
    assert_same(*found)


@pytest.mark.parametrize("mode", MODES, ids=["reentrant", ""])
def test_a_forward_between_two_backwards_leaves_the_first_run_known(mode):
    found = []
    for forward in (nn.Module.__call__, segmented(mode)):
        model = Network(RENORMS["wide"])
        xs = [(normal((7, 4), seed) + seed).requires_grad_() for seed in range(3)]
        late, early = (forward(model, x).square().sum() for x in xs[:2])
        early.backward()
        another = forward(model, xs[2]).square().sum()
        late.backward()
        another.backward()
        found.append([p.grad for p in model.parameters()])
    assert_same(*found)


def test_a_graph_that_is_kept_is_recomputed_alike_at_its_second_backward():
    found = []
    for forward in (nn.Module.__call__, segmented(False)):
        model = Network(RENORMS["wide"])
        loss = forward(model, normal((7, 4), 0).requires_grad_()).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert_same(*found)


@pytest.mark.parametrize("mode", MODES, ids=["reentrant", ""])
def test_while_accumulating_a_recomputed_forward_uses_its_first_runs(mode):
    def accumulating(forward):
        def step(model, x):
            with bn.accumulate(model):
                return torch.cat([forward(model, part) for part in x.split([3, 4])])

        return step

    wanted = steps(Network(RENORMS["wide"]), accumulating(nn.Module.__call__))
    assert_same(steps(Network(RENORMS["wide"]), accumulating(segmented(mode))), wanted)


def selective(model, x):
    """Run the model in a checkpoint that keeps only the outputs of linear layers."""

    def policy(_, operator, *args, **kwargs):
        kept = operator == torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    context = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(model, x, use_reentrant=False, context_fn=context)


@pytest.mark.parametrize("chunk", [None, 3], ids=["", "virtual"])
def test_recomputation_in_a_selective_checkpoint_uses_the_first_run(chunk):
    wanted = steps(Network(RENORMS["wide"], virtual_batch_size=chunk), nn.Module.__call__)
    assert_same(steps(Network(RENORMS["wide"], virtual_batch_size=chunk), selective), wanted)


@pytest.mark.parametrize("mode", MODES, ids=["reentrant", ""])
def test_recomputation_through_the_operators_uses_the_first_run(mode):
    wanted = steps(Network(RENORMS["fixed"]), nn.Module.__call__)
    with PassThroughMode():
        found = steps(Network(RENORMS["fixed"]), segmented(mode))
    assert_same(found, wanted)


@compiles
def test_torch_refuses_recomputation_in_a_compiled_function_that_updates_statistics():
    torch._dynamo.reset()
    model = Network(RENORMS["wide"])
    compiled = torch.compile(lambda x: whole(False)(model, x).sin(), backend="aot_eager_decomp_partition")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        steps(model, lambda _, x: compiled(x), count=1)
