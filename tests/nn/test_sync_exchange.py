"""The exchange of statistics over processes: what is sent, among whom, and what goes wrong."""

import copy
import os
import pickle
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm as bn
from ranks import on_ranks, run_rank
from support import randn

# Sums of a few float32 numbers of size 10 or less, in another order: off by less than 1e-5 of them.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
C = 3


class Collectives(TorchDispatchMode):
    """A mode that records the names of the collectives that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace and "wait" not in func.__name__:
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def counted(rank):
    layer, x = bn.BatchNorm1d(C, sync=True, activation="relu"), randn(4, C).requires_grad_()
    layer(x).sum().backward()
    with Collectives() as forward:
        y = layer(x, residual=x, mask=torch.ones(4, dtype=torch.bool))
    with Collectives() as backward:
        y.sum().backward()
    return forward.names, backward.names


def test_a_layer_takes_one_collective_forward_and_one_backward(tmp_path):
    for forward, backward in on_ranks(counted, 2, tmp_path):
        assert (forward, backward) == (["all_gather_into_tensor"], ["all_reduce"])


def in_groups(rank):
    groups = [dist.new_group(ranks) for ranks in ([0, 2], [1])]
    layer = bn.BatchNorm1d(C, sync=True, process_group=groups[rank % 2])
    stranger = bn.BatchNorm1d(C, sync=True, process_group=groups[1 - rank % 2])
    assert copy.deepcopy(layer).process_group is layer.process_group
    with pytest.raises(bn.UnsupportedError, match="process group"):
        pickle.dumps(layer)
    x = randn(9, C).split((2, 3, 4))[rank]
    layer(x), stranger(x)
    return layer.running_mean, stranger.running_mean


def test_only_ranks_of_the_group_share_their_statistics(tmp_path):
    found = on_ranks(in_groups, 3, tmp_path)
    parts = randn(9, C).split((2, 3, 4))
    for rank, seen in enumerate((torch.cat((parts[0], parts[2])), parts[1], torch.cat((parts[0], parts[2])))):
        torch.testing.assert_close(found[rank], (0.1 * seen.mean(0), 0.1 * parts[rank].mean(0)), **CLOSE)


def infinite_on_one(rank):
    layer, x = bn.BatchNorm1d(C, sync=True), randn(4, C)
    if rank == 1:
        x[2, 0] = torch.inf
    layer(x)
    return dict(layer.named_buffers())


def test_a_value_that_is_not_finite_on_one_rank_skips_the_update_on_all(tmp_path):
    for buffers in on_ranks(infinite_on_one, 2, tmp_path):
        assert int(buffers["skipped_batches"]) == 1
        assert int(buffers["num_batches_tracked"]) == 0
        assert torch.equal(buffers["running_mean"], torch.zeros(C))


def one_value(rank, small_batch):
    layer = bn.BatchNorm1d(C, sync=True, small_batch=small_batch)
    y = layer(randn(1 - rank, C))
    return y, layer.num_batches_tracked


def test_a_single_value_on_all_ranks_together_raises_on_each(tmp_path):
    for error in on_ranks(one_value, 2, tmp_path, "raise", errors=2):
        assert isinstance(error, bn.InputError)
        assert "more than 1 value per channel" in str(error)


def test_a_single_value_may_be_normalized_with_the_running_statistics(tmp_path):
    (y, seen), (empty, _) = on_ranks(one_value, 2, tmp_path, "running")
    torch.testing.assert_close(y, randn(1, C), **CLOSE)
    assert (empty.shape, int(seen)) == ((0, C), 0)


def other_layers(rank):
    model = nn.Sequential(nn.Linear(4, C + rank), bn.BatchNorm1d(C + rank, sync=True))
    model(torch.ones(3, 4))


def test_ranks_at_different_layers_get_an_error_that_names_them(tmp_path):
    for error in on_ranks(other_layers, 2, tmp_path, errors=2):
        assert isinstance(error, bn.DistributedError)
        assert "rank 0 of the group is at '1: 3 channels of torch.float32, eps=1e-05'" in str(error)
        assert "rank 1 of the group is at '1: 4 channels" in str(error)


def other_order(rank):
    one, other = bn.BatchNorm1d(C, sync=True), bn.BatchNorm1d(C, sync=True, eps=1e-3)
    x = torch.ones(3, C)
    for layer in (one, other) if rank else (other, one):
        layer(x)


def test_ranks_that_use_layers_in_another_order_get_an_error_that_names_them(tmp_path):
    for error in on_ranks(other_order, 2, tmp_path, errors=2):
        assert isinstance(error, bn.DistributedError)
        assert "rank 0 of the group is at '3 channels of torch.float32, eps=0.001'" in str(error)


def one_layer_more(rank):
    dist.distributed_c10d._get_default_store().set_timeout(timedelta(seconds=2))
    norms = [bn.BatchNorm1d(C, sync=True) for _ in range(2 - rank)]
    nn.Sequential(*norms)(torch.ones(3, C, requires_grad=True)).sum().backward()


def test_a_rank_with_one_layer_more_gets_an_error_after_the_timeout(tmp_path):
    alone, other = on_ranks(one_layer_more, 2, tmp_path, errors=2)
    assert isinstance(alone, bn.DistributedError)
    assert "rank 1 of the group did not answer within the timeout, while this one is at '1: 3" in str(alone)
    assert isinstance(other, RuntimeError)


def eager_after_compiled(rank):
    warnings.simplefilter("ignore", DeprecationWarning)  # torch.compile itself uses deprecated functions of torch
    layer = bn.BatchNorm1d(C, sync=True)
    compiled = torch.compile(layer, backend="aot_eager", dynamic=False)
    x = randn(4, C)
    compiled(x)
    return [(layer if rank else compiled)(x) for _ in range(2)][-1]


def test_a_rank_that_falls_back_from_compiled_to_eager_stays_in_step(tmp_path):
    first, second = on_ranks(eager_after_compiled, 2, tmp_path)
    torch.testing.assert_close(first, second, **CLOSE)


def one_leaves(rank):
    layer, x = bn.BatchNorm1d(C, sync=True), randn(4, C)
    y = layer(x.requires_grad_())
    if rank == 2:
        os._exit(1)
    y.sum().backward()


def test_a_rank_that_dies_gives_the_others_an_error(tmp_path):
    *others, gone = on_ranks(one_leaves, 3, tmp_path, errors=2)
    assert gone is None
    assert all(isinstance(error, RuntimeError) for error in others)


def one_is_late(rank, done):
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    layer, x = bn.BatchNorm1d(C, sync=True, process_group=group), randn(4, C)
    layer(x)
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait([done])  # as long as the other waits
        return
    try:
        layer(x)
    finally:
        store.set(done, "")


def test_a_rank_that_is_late_gives_the_others_an_error_after_the_timeout(tmp_path):
    error, late = on_ranks(one_is_late, 2, tmp_path, "done", errors=1)
    assert isinstance(error, RuntimeError)
    assert late is None


def refused(rank, way):
    layer, x = bn.BatchNorm1d(C, sync=True), randn(4, C).requires_grad_()
    if way == "torch.func":
        torch.func.grad(lambda x: layer(x).sum())(x)
    else:
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        first.sum().backward()


@pytest.mark.parametrize(("way", "words"), [("torch.func", "transforms cannot do"), ("twice", "differentiate twice")])
def test_transforms_and_second_derivatives_are_refused(way, words, tmp_path):
    assert all(words in str(error) for error in on_ranks(refused, 2, tmp_path, way, errors=2))


# In one process.


def test_without_other_processes_it_is_an_ordinary_layer(tmp_path):
    plain, x = bn.BatchNorm1d(C), randn(5, C)
    layers = [bn.BatchNorm1d(C, sync=True) for _ in range(2)]
    expected, first = plain(x), layers[0](x)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        second = layers[1](x)
    finally:
        dist.destroy_process_group()
    for y, layer in zip((first, second), layers, strict=True):
        assert torch.equal(y, expected)
        assert torch.equal(layer.running_var, plain.running_var)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sync": 1}, "sync must be True or False; got 1"),
        ({"sync": True, "virtual_batch_size": 4}, "exclude each other.*; got virtual_batch_size=4"),
        ({"sync": True, "process_group": "gloo"}, "must be None or a torch.distributed.ProcessGroup; got 'gloo'"),
        ({"process_group": "gloo"}, "got sync=False"),
    ],
    ids=str,
)
def test_contradictory_options_are_refused(options, words):
    with pytest.raises(bn.InputError, match=words):
        bn.BatchNorm1d(C, **options)


def test_the_repr_names_the_option():
    assert "sync=True" in repr(bn.BatchNorm1d(C, sync=True))
    assert "sync" not in repr(bn.BatchNorm1d(C))


def test_copies_and_pickles_keep_the_option_and_compare_their_ranks_again():
    layer = bn.BatchNorm1d(C, sync=True)
    layer.step_state.ranks_agreed = True
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (twin.sync, twin.process_group, twin.step_state.ranks_agreed) == (True, None, False)


if __name__ == "rank":
    run_rank(globals())
