"""Statistics over processes: a batch in parts gives what one process makes of the whole."""

import copy
import multiprocessing
import os
import pickle
import runpy
import subprocess
import sys
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import batchnorm as bn

# Sums of at most a few hundred float32 numbers of size 10 or less, in another order: off by less than 1e-5 of them.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Half precision rounds the gradient twice, by 2**-9 each, and y once.
TOLERANCES = {torch.float32: CLOSE, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}
TOLERANCES[torch.bfloat16] = {"rtol": 2**-7, "atol": 2**-7}
C = 3
# The server has imported torch, so that a rank starts in a moment; it has run no backward, which can't be forked.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "torch._dynamo", "torch.distributed.fsdp", "batchnorm"])


def on_ranks(case, world, folder, *given, seconds=60, expected=0):
    """What the case returns on each rank, or its error; None of a rank that left without."""
    processes = []
    for rank in range(world):
        task = {"TASK": (case.__name__, rank, world, str(folder), given)}
        processes.append(PROCESSES.Process(target=runpy.run_path, args=(__file__, task, "rank"), daemon=True))
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
    assert not stuck
    files = [folder / f"{rank}.pt" for rank in range(world)]
    found = [torch.load(file, weights_only=False) if file.exists() else None for file in files]
    errors = [result for result in found if isinstance(result, Exception)]
    assert len(errors) == expected, errors
    return found


def run_rank(name, rank, world, folder, given):
    """As a task of `on_ranks`, or of torchrun, which gives rank and world, and a store of its own."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = None if "TORCHELASTIC_RUN_ID" in os.environ else dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    try:
        result = globals()[name](rank, *given)
    except Exception as error:  # noqa: BLE001 (handed to the test)
        result = type(error)(str(error)) if isinstance(error, bn.errors.BatchNormError) else RuntimeError(repr(error))
    torch.save(result, f"{folder}/{rank}.pt")


# One batch through one layer.


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SETTINGS = {
    "plain": {},
    "rows": {"shape": (C,)},
    "float64": {"dtype": torch.float64, "activation": "relu"},
    "bfloat16": {"dtype": torch.bfloat16},
    "without gamma and beta": {"affine": False, "activation": "relu"},
    "without beta": {"bias": False},
    "masked": {"masked": True, "activation": "leaky_relu"},
    "residual": {"with_residual": True, "activation": "relu"},
    "residual alone": {"with_residual": True, "masked": True},
    "silu": {"with_residual": True, "masked": True, "activation": "silu"},
    "channels last": {"shape": (C, 2, 3), "channels_last": True, "activation": "relu"},
    "channel_dim": {"shape": (2, C), "channel_dim": -1, "with_residual": True, "masked": True},
    "renorm": {"renorm": bn.Renorm(9.0, 9.0), "activation": "relu"},
    "kept as in Keras": {"unbiased": False, "momentum": None},
}


def batch_of(
    counts, shape=(C, 4), dtype=torch.float32, masked=False, with_residual=False, channels_last=False, **options
):
    """A layer, the whole batch and the gradient of its output, given the counts of samples on the ranks."""
    layer = bn.BatchNorm(C, dtype=dtype, **options)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(numbers(C, seed=i + 1) + 1)
    x = (numbers(sum(counts), *shape) * 2 + 3).to(dtype)
    residual = numbers(*x.shape, seed=5).to(dtype) if with_residual else None
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    positions = torch.empty(x.shape).select(layer.channel_dim, 0).shape
    mask = numbers(*positions, seed=6) > -0.5 if masked else None
    return layer, x, residual, mask, numbers(*x.shape, seed=7).to(dtype)


def step(layer, x, residual, mask, dy):
    """What a training step of the layer gives."""
    leaves = [None if values is None else values.clone().requires_grad_() for values in (x, residual)]
    y = layer(*leaves, mask=mask)
    y.backward(dy)
    found = {"y": y.detach(), "dx": leaves[0].grad, "dresidual": None if residual is None else leaves[1].grad}
    found |= {f"d{name}": parameter.grad for name, parameter in layer.named_parameters()}
    return found | {name: values for name, values in layer.named_buffers() if name != "samples_seen"}  # each rank's own


def part_of(whole, counts, rank):
    return [values if values is None else values.split(counts)[rank] for values in whole]


def one_batch(rank, setting, counts):
    layer, *whole = batch_of(counts, **setting)
    layer.sync = True
    part = part_of(whole, counts, rank)
    step(copy.deepcopy(layer), *part)  # of which the copy alone knows
    return step(layer, *part)


def assert_as_of_the_whole(parts, whole, close):
    for name, expected in whole.items():
        values = [part[name] for part in parts]
        if name in ("y", "dx", "dresidual"):
            actual = None if expected is None else torch.cat(values)
        elif name in ("dweight", "dbias"):
            actual = sum(values)
        else:
            actual = values[0]
            assert all(torch.equal(other, actual) for other in values)
        torch.testing.assert_close(actual, expected, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("setting", SETTINGS)
def test_parts_of_a_batch_give_what_the_whole_gives_in_one_process(setting, tmp_path):
    setting, counts = SETTINGS[setting], (4, 0, 1)
    parts = on_ranks(one_batch, 3, tmp_path, setting, counts)
    layer, *whole = batch_of(counts, **setting)
    close = TOLERANCES[setting.get("dtype", torch.float32)]
    assert_as_of_the_whole(parts, step(layer, *whole), close)
    assert parts[1]["y"].shape[0] == 0
    assert all(not parts[1][f"d{name}"].any() for name, _ in layer.named_parameters())


@pytest.mark.parametrize("counts", [(1, 1), (0, 6), (2, 0, 1, 5)], ids=str)
def test_counts_may_be_any_on_any_rank(counts, tmp_path):
    parts = on_ranks(one_batch, len(counts), tmp_path, {"shape": (C,)}, counts)
    layer, *whole = batch_of(counts, shape=(C,))
    assert_as_of_the_whole(parts, step(layer, *whole), CLOSE)


def far_away(rank, counts):
    x = (numbers(sum(counts), C, 50) + 1e5).float()
    layer = bn.BatchNorm1d(C, sync=True)
    return step(layer, *part_of((x, None, None, numbers(*x.shape, seed=1).float()), counts, rank))


def test_a_mean_far_above_the_deviation_costs_no_digits(tmp_path):
    counts = (3, 5)
    parts = on_ranks(far_away, 2, tmp_path, counts)
    x = (numbers(8, C, 50) + 1e5).float().double().requires_grad_()
    y = nn.BatchNorm1d(C).double()(x)
    y.backward(numbers(*x.shape, seed=1).float().double())
    torch.testing.assert_close(torch.cat([part["y"] for part in parts]).double(), y, **CLOSE)
    torch.testing.assert_close(torch.cat([part["dx"] for part in parts]).double(), x.grad, **CLOSE)


# Training.


def network(dtype=torch.float32, **options):
    torch.manual_seed(0)
    norms = bn.BatchNorm1d(6, activation="relu", **options), bn.BatchNorm1d(5, **options)
    return nn.Sequential(nn.Linear(4, 6), norms[0], nn.Linear(6, 5), norms[1], nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def batches(world, steps):
    """Ragged parts of a batch at each step: inputs and targets on every rank, of 0 samples and 1 too."""
    for i in range(steps):
        counts = [(3 * rank + i) % 7 + (rank == i % world) * 2 for rank in range(world)]
        x = numbers(sum(counts), 4, seed=i) * 2 + 1
        yield x.split(counts), x.sin().sum(1, keepdim=True).split(counts)


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def train(model, run, parts, whole, weight=1.0):
    """Steps of momentum SGD; whole is called before the optimizer's step, to add up gradients."""
    optimizer = optimizer_of(model)
    dtype = next(model.parameters()).dtype
    for x, target, count in parts:
        x, target = x.to(dtype), target.to(dtype)
        optimizer.zero_grad()
        ((run(x) - target).square().sum() * weight / count).backward()
        whole(model)
        optimizer.step()


def on_one_process(world, steps, dtype=torch.float32):
    model = network(dtype)
    parts = [(torch.cat(x), torch.cat(target), sum(map(len, x))) for x, target in batches(world, steps)]
    train(model, model, parts, lambda _: None)
    return model.state_dict()


def own_parts(rank, world, steps):
    return [(x[rank], target[rank], sum(map(len, x))) for x, target in batches(world, steps)]


def add_up(model):
    gradients = nn.utils.parameters_to_vector(parameter.grad for parameter in model.parameters())
    dist.all_reduce(gradients)
    nn.utils.vector_to_parameters(gradients, [parameter.grad for parameter in model.parameters()])


def hundred_steps(rank, world):
    model = network(torch.float64, sync=True)
    train(model, model, own_parts(rank, world, 100), add_up)
    return model.state_dict()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_under_torchrun_a_hundred_steps_on_ragged_parts_train_as_one_process_does(world, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    done = subprocess.run([*torchrun, __file__, tmp_path], timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = on_one_process(world, 100, torch.float64)
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        # In float32 training itself makes 1e-5 of a rounding in 100 steps, 100 times the rounding: here 1e-14.
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def data_parallel(rank, world):
    model = network(sync=True)
    # It takes the mean of the ranks' gradients, so that each weighs the world's size.
    train(model, nn.parallel.DistributedDataParallel(model), own_parts(rank, world, 10), lambda _: None, world)
    return model.state_dict()


def sharded(rank, world):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    model = network(sync=True)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, model, own_parts(rank, world, 10), lambda _: None, world)
    return {name: getattr(v, "full_tensor", lambda v=v: v)() for name, v in model.state_dict().items()}


def compiled(rank, world):
    model = network(sync=True)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.compile itself uses what torch deprecates
        train(model, run, own_parts(rank, world, 3), add_up)
    return model.state_dict()


@pytest.mark.parametrize(("case", "steps"), [(data_parallel, 10), (sharded, 10), (compiled, 3)])
def test_it_trains_as_one_process_does_in_torchs_wrappers(case, steps, tmp_path):
    expected = on_one_process(2, steps)
    for found in on_ranks(case, 2, tmp_path, 2):
        torch.testing.assert_close(found, expected, **CLOSE)


def recomputed(rank, use_reentrant, renorm):
    model = network(sync=True, renorm=renorm)
    # The first batch has on rank 0 the mean that the second has on both together.
    inputs = [
        (numbers(4 + rank, 4, seed=i).float() + means[rank]).requires_grad_()
        for i, means in enumerate([(10, -10), (0, 20)])
    ]
    outputs = [model(x) if use_reentrant is None else checkpoint(model, x, use_reentrant=use_reentrant) for x in inputs]
    sum(y.square().sum() for y in outputs).backward()
    found = {f"dx{i}": x.grad for i, x in enumerate(inputs)}
    return found | model.state_dict() | {f"d{name}": parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("renorm", [None, bn.Renorm(9.0, 9.0)], ids=str)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_forward_run_again_by_checkpointing_moves_the_statistics_once(use_reentrant, renorm, tmp_path):
    for folder in ("plain", "again"):
        (tmp_path / folder).mkdir()
    plain = on_ranks(recomputed, 2, tmp_path / "plain", None, renorm)
    assert int(plain[0]["1.num_batches_tracked"]) == 2
    for found, expected in zip(on_ranks(recomputed, 2, tmp_path / "again", use_reentrant, renorm), plain, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def accumulated(rank):
    layer, parts = bn.BatchNorm1d(C, sync=True), numbers(12, C).float().split((2, 1, 5, 4))
    with bn.accumulate(layer):
        layer(parts[rank])
        layer(parts[2 + rank])
    return layer.state_dict()


def test_micro_batches_pool_the_moments_of_all_ranks(tmp_path):
    layer = bn.BatchNorm1d(C)
    layer(numbers(12, C).float())
    for found in on_ranks(accumulated, 2, tmp_path):
        torch.testing.assert_close(found, layer.state_dict(), **CLOSE)


# What is exchanged, and among whom.


class Collectives(TorchDispatchMode):
    """Keeps the names of the collectives that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace and "wait" not in func.__name__:
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def counted(rank):
    layer, x = bn.BatchNorm1d(C, sync=True, activation="relu"), numbers(4, C).float().requires_grad_()
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
    with pytest.raises(bn.errors.UnsupportedError, match="process group"):
        pickle.dumps(layer)
    x = numbers(9, C).float().split((2, 3, 4))[rank]
    layer(x), stranger(x)
    return layer.running_mean, stranger.running_mean


def test_only_ranks_of_the_group_share_their_statistics(tmp_path):
    found = on_ranks(in_groups, 3, tmp_path)
    parts = numbers(9, C).float().split((2, 3, 4))
    for rank, seen in enumerate((torch.cat((parts[0], parts[2])), parts[1], torch.cat((parts[0], parts[2])))):
        torch.testing.assert_close(found[rank], (0.1 * seen.mean(0), 0.1 * parts[rank].mean(0)), **CLOSE)


def infinite_on_one(rank):
    layer, x = bn.BatchNorm1d(C, sync=True), numbers(4, C).float()
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
    y = layer(numbers(1 - rank, C).float())
    return y, layer.num_batches_tracked


def test_a_single_value_on_all_ranks_together_raises_on_each(tmp_path):
    for error in on_ranks(one_value, 2, tmp_path, "raise", expected=2):
        assert isinstance(error, bn.errors.InputError)
        assert "more than 1 value per channel" in str(error)


def test_a_single_value_may_be_normalised_with_the_running_statistics(tmp_path):
    (y, seen), (empty, _) = on_ranks(one_value, 2, tmp_path, "running")
    torch.testing.assert_close(y, numbers(1, C).float(), **CLOSE)
    assert (empty.shape, int(seen)) == ((0, C), 0)


def other_layers(rank):
    model = nn.Sequential(nn.Linear(4, C + rank), bn.BatchNorm1d(C + rank, sync=True))
    model(torch.ones(3, 4))


def test_ranks_at_different_layers_are_told_which(tmp_path):
    for error in on_ranks(other_layers, 2, tmp_path, expected=2):
        assert isinstance(error, bn.errors.DistributedError)
        assert "rank 0 of the group is at '1: 3 channels of torch.float32, eps=1e-05'" in str(error)
        assert "rank 1 of the group is at '1: 4 channels" in str(error)


def other_order(rank):
    one, other = bn.BatchNorm1d(C, sync=True), bn.BatchNorm1d(C, sync=True, eps=1e-3)
    x = torch.ones(3, C)
    for layer in (one, other) if rank else (other, one):
        layer(x)


def test_ranks_that_use_layers_in_another_order_are_told_which(tmp_path):
    for error in on_ranks(other_order, 2, tmp_path, expected=2):
        assert isinstance(error, bn.errors.DistributedError)
        assert "rank 0 of the group is at '3 channels of torch.float32, eps=0.001'" in str(error)


def one_layer_more(rank):
    dist.distributed_c10d._get_default_store().set_timeout(timedelta(seconds=2))
    norms = [bn.BatchNorm1d(C, sync=True) for _ in range(2 - rank)]
    nn.Sequential(*norms)(torch.ones(3, C, requires_grad=True)).sum().backward()


def test_a_rank_with_a_layer_more_is_told_that_it_is_alone(tmp_path):
    alone, other = on_ranks(one_layer_more, 2, tmp_path, expected=2)
    assert isinstance(alone, bn.errors.DistributedError)
    assert "rank 1 of the group did not answer within the timeout, while this one is at '1: 3" in str(alone)
    assert isinstance(other, RuntimeError)


def eager_after_compiled(rank):
    warnings.simplefilter("ignore", DeprecationWarning)  # torch.compile itself uses what torch deprecates
    layer = bn.BatchNorm1d(C, sync=True)
    compiled = torch.compile(layer, backend="aot_eager", dynamic=False)
    x = numbers(4, C).float()
    compiled(x)
    return [(layer if rank else compiled)(x) for _ in range(2)][-1]


def test_a_rank_that_falls_back_from_compiled_to_eager_stays_in_step(tmp_path):
    first, second = on_ranks(eager_after_compiled, 2, tmp_path)
    torch.testing.assert_close(first, second, **CLOSE)


def one_leaves(rank):
    layer, x = bn.BatchNorm1d(C, sync=True), numbers(4, C).float()
    y = layer(x.requires_grad_())
    if rank == 2:
        os._exit(1)
    y.sum().backward()


def test_a_rank_that_dies_gives_the_others_an_error(tmp_path):
    *others, gone = on_ranks(one_leaves, 3, tmp_path, expected=2)
    assert gone is None
    assert all(isinstance(error, RuntimeError) for error in others)


def one_is_late(rank, done):
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    layer, x = bn.BatchNorm1d(C, sync=True, process_group=group), numbers(4, C).float()
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
    error, late = on_ranks(one_is_late, 2, tmp_path, "done", expected=1)
    assert isinstance(error, RuntimeError)
    assert late is None


def refused(rank, way):
    layer, x = bn.BatchNorm1d(C, sync=True), numbers(4, C).float().requires_grad_()
    if way == "torch.func":
        torch.func.grad(lambda x: layer(x).sum())(x)
    else:
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        first.sum().backward()


@pytest.mark.parametrize(("way", "words"), [("torch.func", "transforms cannot do"), ("twice", "differentiate twice")])
def test_transforms_and_second_derivatives_are_refused(way, words, tmp_path):
    assert all(words in str(error) for error in on_ranks(refused, 2, tmp_path, way, expected=2))


# In one process.


def test_without_other_processes_it_is_a_plain_layer(tmp_path):
    plain, x = bn.BatchNorm1d(C), numbers(5, C).float()
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
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(bn.errors.InputError, match=words):
        bn.BatchNorm1d(C, **options)


def test_the_repr_says_that_it_synchronises():
    assert "sync=True" in repr(bn.BatchNorm1d(C, sync=True))
    assert "sync" not in repr(bn.BatchNorm1d(C))


def test_a_copy_and_a_pickle_keep_the_option_and_agree_anew():
    layer = bn.BatchNorm1d(C, sync=True)
    layer.step_state.ranks_agreed = True
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (twin.sync, twin.process_group, twin.step_state.ranks_agreed) == (True, None, False)


if __name__ == "rank":
    run_rank(*globals()["TASK"])
elif __name__ == "__main__":
    world = int(os.environ["WORLD_SIZE"])
    run_rank("hundred_steps", int(os.environ["RANK"]), world, sys.argv[1], (world,))
    dist.barrier()
    os._exit(0)  # gloo now and then aborts an interpreter that winds down
