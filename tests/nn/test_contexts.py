"""Contexts on one model: how they nest and end, what copies made within them are, and what attributes show."""

import asyncio
import contextvars
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import assert_same_buffers, copied_buffers, network_with_domains, randn

KINDS = [bn.BatchNorm1d, nn.BatchNorm1d]
NAMES = ["running_mean", "running_var"]


def rows(mean, seed=0):
    return randn(32, 2, seed=seed, dtype=torch.float64) + mean


def network(kind=bn.BatchNorm1d):
    return network_with_domains(kind).eval()


def stored(layer, domain=None):
    return [layer._buffers[name if domain is None else f"{name}_{domain}"] for name in NAMES]


def shown(layer):
    return [getattr(layer, name).clone() for name in NAMES]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Two adaptations.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first_undone", [0, 1], ids=["the first first", "the last first"])
def test_a_second_adaptation_replaces_the_first_and_both_can_be_undone_in_any_order(kind, first_undone):
    model, x = network(kind), rows(4)
    before, plain = copied_buffers(model), model(x)
    alone = []
    for mean in (3, 9):
        with bn.adapt(model, [rows(mean)]):
            alone.append(model(x))
    adaptations = []
    for mean, expected in zip((3, 9), alone, strict=True):
        adaptations.append(bn.adapt(model, [rows(mean)]))
        assert torch.equal(model(x), expected)
    adaptations[first_undone].undo()
    assert torch.equal(model(x), alone[1 - first_undone])
    adaptations[1 - first_undone].undo()
    assert torch.equal(model(x), plain)
    assert_same_buffers(model, before)
    assert {type(model[0]), type(model[2])} == {kind}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_adaptation_twice_is_as_once(kind):
    model, x = network(kind), rows(4)
    with bn.adapt(model, [x]):
        expected = model(x), shown(model[2])
        with bn.adapt(model, [x]):
            assert torch.equal(model(x), expected[0])
            assert same(shown(model[2]), expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_adaptation_to_each_batch_and_to_a_loader_replace_each_other(kind):
    model, x = network(kind), rows(4)
    with bn.adapt(model, [rows(9)]):
        to_loader = model(x)
    with bn.adapt(model):
        to_each = model(x)
        with bn.adapt(model, [rows(9)]):
            assert torch.equal(model(x), to_loader)
        assert torch.equal(model(x), to_each)
    with bn.adapt(model, [rows(9)]), bn.adapt(model):
        assert torch.equal(model(x), to_each)


def test_an_adaptation_belongs_to_the_domain_in_which_it_was_made():
    model, x = network(), rows(4)
    outputs = {}
    for name in ("a", "b"):
        with bn.use_domain(model, name):
            outputs[name] = model(x)
    with bn.use_domain(model, "a"):
        adaptation = bn.adapt(model, [rows(9)])
        adapted = model(x)
        with bn.use_domain(model, "b"):
            assert torch.equal(model(x), outputs["b"])
    with bn.use_domain(model, "b"):
        assert torch.equal(model(x), outputs["b"])
        with bn.use_domain(model, "a"):
            assert torch.equal(model(x), adapted)
    adaptation.undo()
    with bn.use_domain(model, "a"):
        assert torch.equal(model(x), outputs["a"])


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_an_adaptation_writes_what_was_in_force_for_all(kind):
    model, x = network(kind), rows(4)
    adaptation = bn.adapt(model, [rows(9)])
    expected, statistics = model(x), shown(model[2])
    adaptation.keep()
    assert torch.equal(model(x), expected)
    assert same(stored(model[2]), statistics)
    adaptation.undo()
    assert torch.equal(model(x), expected)
    with pytest.raises(bn.InputError, match="must be in force to be kept; this one has ended"):
        adaptation.keep()


def test_keeping_an_adaptation_in_a_domain_writes_that_domain_alone():
    model = network()
    before = copied_buffers(model[0])
    with bn.use_domain(model, "a"):
        bn.adapt(model, [rows(9)]).keep()
    changed = {name for name, values in model[0].named_buffers() if not torch.equal(values, before[name])}
    assert changed == {"running_mean_a", "running_var_a"}


def test_an_adaptation_to_each_batch_cannot_be_kept():
    with bn.adapt(network()) as adaptation, pytest.raises(bn.InputError, match="to a loader has statistics to keep"):
        adaptation.keep()


@pytest.mark.parametrize("kind", KINDS)
def test_recalibration_within_an_adaptation_writes_what_it_writes_without(kind):
    model, other = network(kind), network(kind)
    bn.recalibrate(other, [rows(5)])
    with bn.adapt(model, [rows(9)]):
        adapted = model(rows(4))
        bn.recalibrate(model, [rows(5)])
        assert torch.equal(model(rows(4)), adapted)
    assert_same_buffers(model, copied_buffers(other))


@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_is_measured_against_the_adapted_statistics(kind):
    model, x = network(kind), rows(9)
    assert bn.detect_shift(model, [x]).shifted
    with bn.adapt(model, [x], prior=0):
        assert not bn.detect_shift(model, [x]).shifted


# What attributes show.


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_show_the_adapted_statistics_in_this_thread_and_state_dicts_the_stored_ones(kind):
    model = network(kind)
    before, elsewhere = copied_buffers(model), []
    with bn.adapt(model, [rows(9)]):
        assert not torch.equal(model[0].running_mean, before["0.running_mean"])
        thread = threading.Thread(target=lambda: elsewhere.extend(shown(model[0])))
        thread.start()
        thread.join()
        state = model.state_dict()
        assert same(shown(pickle.loads(pickle.dumps(model))[0]), stored(model[0]))
    assert same(elsewhere, stored(model[0]))
    assert all(torch.equal(values, before[name]) for name, values in state.items() if name in before)


def test_attributes_show_the_statistics_of_the_active_domain():
    layer = network()[0]
    with bn.use_domain(layer, "a"):
        assert layer.active_domain == "a"
        assert same(shown(layer), stored(layer, "a"))
        assert layer.num_batches_tracked is layer.num_batches_tracked_a
    assert layer.active_domain is None
    assert same(shown(layer), stored(layer))


def test_a_domain_added_within_another_begins_as_a_copy_of_the_layers_own_statistics():
    layer = network()[0]
    with bn.use_domain(layer, "a"):
        bn.add_domains(layer, ["c"])
    assert same(stored(layer, "c"), stored(layer))


# Copies.

CONTEXTS = {
    "adapt to a loader": lambda model: bn.adapt(model, [rows(9)]),
    "adapt to each batch": bn.adapt,
    "no updates": bn.no_stat_updates,
    "domain": lambda model: bn.use_domain(model, "a"),
    "accumulate": bn.accumulate,
}
COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": lambda model: nn.Sequential(*[copy.copy(layer) for layer in model]),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


FOR_OURS = ("domain", "accumulate")


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    ("kind", "context"),
    [(kind, context) for kind in KINDS for context in CONTEXTS if kind is bn.BatchNorm1d or context not in FOR_OURS],
)
def test_a_copy_made_within_a_context_is_plain_within_it_and_after(kind, context, make):
    model, plain, x = network(kind), network(kind), rows(4)
    for training in (False, True):
        with CONTEXTS[context](model):
            twin = make(model).train(training)
            within = twin(x)
        plain.train(training)
        assert torch.equal(within, plain(x))
        assert torch.equal(twin(x), plain(x))
        assert [type(layer) for layer in twin] == [type(layer) for layer in plain]
        if training and make is not COPIES["copy"]:  # a shallow copy shares its statistics
            assert_same_buffers(twin, copied_buffers(plain))


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_deepcopy_of_a_parametrized_layer_made_within_a_context_is_plain(kind):
    layer, x = network(kind)[0], rows(4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    plain = layer(x)
    with bn.adapt(layer, [rows(9)]):
        twin = copy.deepcopy(layer)
        assert torch.equal(twin(x), plain)
    assert type(twin) is type(layer)


# How contexts end.


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_ends_every_context(kind):
    model, x = network(kind), rows(4)
    plain = model(x)
    for name, context in CONTEXTS.items():
        if kind is bn.BatchNorm1d or name not in ("domain", "accumulate"):
            with pytest.raises(ZeroDivisionError), context(model):
                1 / 0
            assert torch.equal(model(x), plain)
            assert type(model[0]) is kind


def test_an_adaptation_undone_by_another_thread_ends_where_it_was_made():
    model, x = network(), rows(4)
    plain, adaptation = model(x), bn.adapt(model, [rows(9)])
    assert not torch.equal(model(x), plain)
    thread = threading.Thread(target=adaptation.undo)
    thread.start()
    thread.join()
    assert torch.equal(model(x), plain)


def test_a_generator_that_is_closed_ends_the_context_that_it_opened():
    model, x = network(), rows(4)

    def within():
        with bn.use_domain(model, "a"):
            yield model(x)
            yield model(x)

    plain, generator = model(x), within()
    assert not torch.equal(next(generator), plain)
    contextvars.copy_context().run(generator.close)
    assert torch.equal(model(x), plain)


def test_contexts_left_in_the_order_of_entering_end_one_by_one():
    layer, x = network()[0], rows(4)
    first, second = bn.use_domain(layer, "a"), bn.use_domain(layer, "b")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert layer.active_domain == "b"
    second.__exit__(None, None, None)
    assert layer.active_domain is None
    assert torch.equal(layer(x), network()[0](x))


# Notebooks, tasks and threads that inherit a context.


@pytest.mark.parametrize("loader", [None, [rows(9)]], ids=["each batch", "a loader"])
def test_an_adaptation_made_in_a_cell_is_in_force_in_the_next_cells(loader):
    model, x, kept = network(), rows(4), {}
    plain = model(x)
    with bn.adapt(model, loader):
        expected = model(x)

    def first_cell():
        kept["adaptation"] = bn.adapt(model, loader)

    def second_cell():
        return model(x)

    def last_cell():
        kept["adaptation"].undo()

    contextvars.copy_context().run(first_cell)
    assert torch.equal(contextvars.copy_context().run(second_cell), expected)
    assert torch.equal(model(x), expected)
    contextvars.copy_context().run(last_cell)
    assert torch.equal(contextvars.copy_context().run(second_cell), plain)


def test_an_adaptation_made_in_a_task_outlasts_it_in_its_thread_but_is_in_no_other_task_meanwhile():
    model, x = network(), rows(4)
    plain = model(x)

    async def cell():
        adaptation = bn.adapt(model, [rows(9)])
        await asyncio.sleep(0)
        return adaptation, model(x)

    async def main():
        task = asyncio.create_task(cell())
        await asyncio.sleep(0)
        meanwhile = model(x)
        adaptation, expected = await task
        after = await asyncio.create_task(forward())
        adaptation.undo()
        return meanwhile, expected, after, model(x)

    async def forward():
        return model(x)

    meanwhile, expected, after, undone = asyncio.run(main())
    assert torch.equal(meanwhile, plain)
    assert torch.equal(after, expected)
    assert not torch.equal(expected, plain)
    assert torch.equal(undone, plain)


def test_as_a_context_in_a_copied_context_an_adaptation_stays_there():
    model, x = network(), rows(4)
    plain = model(x)

    def cell():
        bn.adapt(model, [rows(9)]).__enter__()

    contextvars.copy_context().run(cell)
    assert torch.equal(model(x), plain)


def test_a_task_and_a_thread_that_inherit_a_context_have_it_until_it_ends():
    layer, x = network()[0], rows(4)
    with bn.use_domain(layer, "a"):
        expected = layer(x)

    async def forwards():
        found = [layer(x)]
        await asyncio.sleep(0.01)
        return [*found, layer(x)]

    async def main():
        with bn.use_domain(layer, "a"):
            task = asyncio.create_task(forwards())
            in_thread = await asyncio.to_thread(layer, x)
            await asyncio.sleep(0)
        return in_thread, *await task

    in_thread, within, after = asyncio.run(main())
    assert torch.equal(in_thread, expected)
    assert torch.equal(within, expected)
    assert torch.equal(after, layer(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loader", [None, [rows(9)]], ids=["each batch", "a loader"])
def test_an_adaptation_that_is_never_undone_does_not_keep_the_model(kind, loader):
    model = network(kind)
    bn.adapt(model, loader)
    layer = weakref.ref(model[0])
    del model
    gc.collect()
    assert layer() is None


# Changes from outside, while updates are paused.


@pytest.mark.parametrize("context", ["adapt to a loader", "adapt to each batch", "no updates"])
@pytest.mark.parametrize("kind", KINDS)
def test_update_bn_within_a_context_that_pauses_updates_warns_and_changes_nothing(kind, context):
    model = network(kind).train()
    before = copied_buffers(model)
    with CONTEXTS[context](model):
        shown_before = shown(model[0])
        with pytest.warns(UserWarning, match="leaves running statistics as they are within batchnorm"):
            torch.optim.swa_utils.update_bn([rows(5)], model)
        with pytest.warns(UserWarning, match="setting running_mean leaves"):
            model[0].running_mean = torch.zeros(2, dtype=torch.float64)
        assert same(shown(model[0]), shown_before)
    assert_same_buffers(model, before)
    model[0].running_mean = torch.full((2,), 4.0, dtype=torch.float64)
    assert model[0].running_mean.tolist() == [4, 4]


def test_a_lazy_layer_of_torchs_sees_its_first_batch_within_no_stat_updates():
    model = nn.Sequential(nn.LazyBatchNorm1d(), bn.LazyBatchNorm1d())
    with bn.no_stat_updates(model):
        model(rows(0).float())
    model(rows(0).float())
    assert [type(layer) for layer in model] == [nn.BatchNorm1d, bn.BatchNorm1d]
    assert int(model[1].num_batches_tracked) == 1
