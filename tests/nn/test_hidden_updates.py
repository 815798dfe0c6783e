"""Running statistics are updated once per use of a layer: not when it is recomputed, nor while updates are paused."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

import batchnorm as bn
from support import PassThroughMode, copied_buffers

MODES = [True, False]
# Torch itself uses deprecated functions.
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def network(norm=bn.BatchNorm1d):
    torch.manual_seed(0)
    layers = nn.Linear(4, 5), norm(5), nn.Tanh(), nn.Linear(5, 3), norm(3), nn.Tanh()
    return nn.Sequential(*layers).double()


def rows(seed=0, count=8):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, 4, generator=generator, dtype=torch.float64) * 2 + 1).requires_grad_()


def counts(model):
    return [int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked")]


def gradients(model, x, forward):
    """Return the gradients of a loss for the input and the parameters, after one step of ``forward(model, x)``."""
    y = forward(model, x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weights).sum(), [x, *model.parameters()])


def backward(y):
    """Run a backward that accumulates gradients, the only kind that reentrant checkpoints support."""
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()


class Twice(nn.Module):
    """A model that uses one layer twice, on different inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.norm = nn.Linear(4, 3), nn.Linear(3, 3), bn.BatchNorm1d(3)
        self.double()

    def lower(self, x):
        return torch.tanh(self.norm(self.first(x)))

    def upper(self, x):
        return torch.tanh(self.norm(self.second(x)) + 1)

    def forward(self, x):
        return self.upper(self.lower(x))


WRAPPED = {
    "one segment": lambda model, x, mode: checkpoint(model, x, use_reentrant=mode),
    "each layer": lambda model, x, mode: functools.reduce(
        lambda z, layer: checkpoint(layer, z, use_reentrant=mode), model, x
    ),
    "a segment in a segment": lambda model, x, mode: checkpoint(
        lambda z: model[3:](checkpoint(model[:3], z, use_reentrant=mode)), x, use_reentrant=mode
    ),
    "checkpoint_sequential": lambda model, x, mode: checkpoint_sequential(model, 2, x, use_reentrant=mode),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_a_checkpointed_step_leaves_statistics_and_gradients_as_a_step_without_does(wrapped, mode):
    plain, checkpointed, x = network(), network(), rows()
    other = x.detach().clone().requires_grad_()
    for _ in range(3):
        backward(plain(x))
        backward(wrapped(checkpointed, other, mode))
    assert counts(checkpointed) == [3, 3]
    for name, value in copied_buffers(plain).items():
        assert torch.equal(checkpointed.get_buffer(name), value), name
    # The same operations on the same numbers, up to the order in which three gradients are added.
    torch.testing.assert_close(other.grad, x.grad, rtol=1e-13, atol=1e-13)
    for one, another in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, another.grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{"momentum": None}, {"activation": "relu"}, {"virtual_batch_size": 3}], ids=str)
def test_a_layer_with_an_option_is_counted_once_under_checkpointing(options, mode):
    plain, checkpointed = (network(functools.partial(bn.BatchNorm1d, **options)) for _ in range(2))
    for seed in range(3):
        plain(rows(seed))
        backward(checkpoint(checkpointed, rows(seed), use_reentrant=mode))
    for name, value in copied_buffers(plain).items():
        assert torch.equal(checkpointed.get_buffer(name), value), name


@pytest.mark.parametrize("mode", MODES)
def test_recomputation_through_the_operators_counts_once(mode):
    model, x = network(), rows()
    with PassThroughMode():
        backward(checkpoint(model, x, use_reentrant=mode))
    assert counts(model) == [1, 1]


def test_selective_checkpointing_counts_once():
    plain, model, x = network(), network(), rows()
    context = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    found = gradients(model, x, lambda f, z: checkpoint(f, z, use_reentrant=False, context_fn=context))
    assert counts(model) == [1, 1]
    for one, another in zip(found, gradients(plain, x, nn.Module.__call__), strict=True):
        torch.testing.assert_close(one, another, rtol=1e-13, atol=1e-13)


def test_a_graph_that_is_kept_and_recomputed_twice_counts_once():
    model, x = network(), rows()
    loss = checkpoint(model, x, use_reentrant=False).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert counts(model) == [1, 1]


@pytest.mark.parametrize("mode", MODES)
def test_a_non_finite_batch_is_counted_as_skipped_once_under_checkpointing(mode):
    layer, x = bn.BatchNorm1d(4), torch.randn(6, 4)
    x[2, 1] = torch.inf
    backward(checkpoint(layer, x.requires_grad_(), use_reentrant=mode))
    assert int(layer.skipped_batches) == 1
    assert int(layer.num_batches_tracked) == 0


@pytest.mark.parametrize("mode", MODES)
def test_eval_under_checkpointing_moves_nothing(mode):
    model = network().eval()
    before = copied_buffers(model)
    backward(checkpoint(model, rows(), use_reentrant=mode))
    for name, value in before.items():
        assert torch.equal(model.get_buffer(name), value), name


def test_a_layer_called_twice_in_one_forward_moves_by_both_inputs():
    model, stock, seen = Twice(), nn.BatchNorm1d(3).double(), []
    model.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    model(rows())
    for x in seen:
        stock(x)
    assert counts(model) == [2]
    # float64 moments of a few numbers, by another order of additions
    torch.testing.assert_close(model.norm.running_mean, stock.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.norm.running_var, stock.running_var, rtol=1e-12, atol=1e-12)


SEGMENTS = {
    "in one segment": lambda model, x, mode: checkpoint(model, x, use_reentrant=mode),
    "in two segments": lambda model, x, mode: checkpoint(
        model.upper, checkpoint(model.lower, x, use_reentrant=mode), use_reentrant=mode
    ),
    "in one segment and outside of it": lambda model, x, mode: model.upper(
        checkpoint(model.lower, x, use_reentrant=mode)
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapped", SEGMENTS.values(), ids=SEGMENTS)
def test_a_layer_called_twice_counts_two_and_not_its_recomputations(wrapped, mode):
    plain, model, x = Twice(), Twice(), rows()
    other = x.detach().clone().requires_grad_()
    backward(plain(x))
    backward(wrapped(model, other, mode))
    assert counts(model) == [2]
    assert torch.equal(model.norm.running_mean, plain.norm.running_mean)
    assert torch.equal(model.norm.running_var, plain.norm.running_var)
    torch.testing.assert_close(other.grad, x.grad, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(model.norm.weight.grad, plain.norm.weight.grad, rtol=1e-13, atol=1e-13)


@compiles
@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
@pytest.mark.parametrize("mode", MODES)
def test_recomputation_inside_a_compiled_function_counts_once(mode, backend):
    torch._dynamo.reset()
    plain, model, x = network(), network(), rows()

    def forward(z):
        return model[3:](checkpoint(model[:3], z, use_reentrant=mode)).sin()

    compiled = torch.compile(forward, backend=backend)
    for _ in range(2):
        found = gradients(model, x, lambda _, z: compiled(z))
        expected = gradients(plain, x, lambda f, z: f(z).sin())
    assert counts(model) == [2, 2]
    # the same formulas on the same float64 numbers
    for name, value in copied_buffers(plain).items():
        torch.testing.assert_close(model.get_buffer(name), value, rtol=1e-12, atol=1e-12)
    for one, another in zip(found, expected, strict=True):
        torch.testing.assert_close(one, another, rtol=1e-12, atol=1e-12)


# Updates paused by no_stat_updates.


@pytest.fixture
def mixed():
    """Return a model with layers of ours and torch's, one of them without statistics, one with a cumulative mean."""
    torch.manual_seed(0)
    norms = bn.BatchNorm1d(4), nn.BatchNorm1d(4), bn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4)
    model = nn.Sequential(*norms, bn.BatchNorm1d(4, momentum=None)).double()
    model(rows(5))
    return model


def test_no_stat_updates_leaves_every_statistic_bitwise_as_it_was(mixed):
    before = copied_buffers(mixed)
    with bn.no_stat_updates(mixed):
        mixed(rows())
        backward(checkpoint(mixed, rows(), use_reentrant=False))
    assert before.keys() == copied_buffers(mixed).keys()
    for name, value in before.items():
        assert torch.equal(mixed.get_buffer(name), value), name


def test_no_stat_updates_leaves_skipped_batches_as_they_were():
    layer, x = bn.BatchNorm1d(4), torch.full((6, 4), torch.inf)
    with bn.no_stat_updates(layer):
        layer(x)
    assert int(layer.skipped_batches) == 0


def test_no_stat_updates_leaves_outputs_and_gradients_as_they_are(mixed):
    twin, x = copy.deepcopy(mixed), rows()
    expected = twin(x), gradients(twin, x, nn.Module.__call__)
    with bn.no_stat_updates(mixed):
        found = mixed(x), gradients(mixed, x, nn.Module.__call__)
    assert torch.equal(found[0], expected[0])
    for one, another in zip(found[1], expected[1], strict=True):
        assert torch.equal(one, another)


def test_after_no_stat_updates_statistics_move_again(mixed):
    twin = copy.deepcopy(mixed)
    with bn.no_stat_updates(mixed):
        mixed(rows(1))
    mixed(rows(2))
    twin(rows(2))
    for name, value in copied_buffers(twin).items():
        assert torch.equal(mixed.get_buffer(name), value), name


def test_after_an_exception_within_no_stat_updates_statistics_move_again(mixed):
    before = counts(mixed)
    with pytest.raises(RuntimeError, match="within"), bn.no_stat_updates(mixed):
        raise RuntimeError("within")
    mixed(rows())
    assert counts(mixed) == [count + 1 for count in before]
    assert [layer.track_running_stats for layer in mixed] == [True, True, False, True, True]


def test_the_inner_of_two_no_stat_updates_leaves_the_outer_at_work(mixed):
    before = copied_buffers(mixed)
    with bn.no_stat_updates(mixed):
        with bn.no_stat_updates(mixed[0]):
            pass
        mixed(rows())
    for name, value in before.items():
        assert torch.equal(mixed.get_buffer(name), value), name


def test_no_stat_updates_of_a_part_leaves_the_rest_moving(mixed):
    before = counts(mixed)
    with bn.no_stat_updates(mixed[0]):
        mixed(rows())
    assert counts(mixed) == [before[0], *(count + 1 for count in before[1:])]


def test_the_state_dict_within_no_stat_updates_is_the_same_and_loads_strictly(mixed):
    before = mixed.state_dict()
    fresh = copy.deepcopy(mixed)
    fresh.apply(lambda layer: layer.reset_running_stats() if hasattr(layer, "reset_running_stats") else None)
    with bn.no_stat_updates(mixed), bn.no_stat_updates(fresh):
        within = mixed.state_dict()
        fresh.load_state_dict(within, strict=True)
    assert within.keys() == before.keys()
    assert within._metadata == before._metadata
    for name, value in before.items():
        assert torch.equal(fresh.state_dict()[name], value), name


def test_eval_within_no_stat_updates_uses_the_running_statistics(mixed):
    mixed.eval()
    x = rows()
    expected = mixed(x)
    with bn.no_stat_updates(mixed):
        assert torch.equal(mixed(x), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_within_no_stat_updates_is_not_counted_by_a_backward_after_it(mode):
    model, x = network(), rows()
    with bn.no_stat_updates(model):
        y = checkpoint(model, x, use_reentrant=mode)
    backward(y)
    assert counts(model) == [0, 0]


@compiles
def test_no_stat_updates_holds_a_compiled_model():
    torch._dynamo.reset()
    layer, x = bn.BatchNorm1d(4).double(), rows()
    compiled = torch.compile(layer, backend="aot_eager")
    compiled(x)
    with bn.no_stat_updates(layer):
        compiled(x)
    compiled(x)
    assert int(layer.num_batches_tracked) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_within_no_stat_updates_moves_its_statistics(copied):
    layer = bn.BatchNorm1d(4).double()
    with bn.no_stat_updates(layer):
        twin = copied(layer)
        twin(rows())
    assert counts(twin) == [1]


def test_a_lazy_layers_first_forward_within_no_stat_updates_moves_nothing():
    layer = bn.LazyBatchNorm1d().double()
    with bn.no_stat_updates(layer):
        layer(rows())
    assert counts(layer) == [0]
    layer(rows())
    assert counts(layer) == [1]


def test_resetting_within_no_stat_updates_warns_and_leaves_the_statistics():
    layer = bn.BatchNorm1d(4).double()
    layer(rows())
    with bn.no_stat_updates(layer), pytest.warns(UserWarning, match="leaves running statistics as they are within"):
        layer.reset_running_stats()
    assert counts(layer) == [1]


def test_a_single_value_within_no_stat_updates_is_told_of_small_batch_too():
    layer = bn.BatchNorm1d(4)
    with bn.no_stat_updates(layer), pytest.raises(bn.InputError, match="small_batch='running'"):
        layer(torch.randn(1, 4))


def test_an_accumulation_within_no_stat_updates_moves_nothing():
    layer = bn.BatchNorm1d(4).double()
    with bn.no_stat_updates(layer), bn.accumulate(layer):
        layer(rows())
    assert counts(layer) == [0]
