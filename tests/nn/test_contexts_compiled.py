"""Contexts around compiled models: right in each context and thread, in a fixed number of compilations."""

import copy
import gc
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import batchnorm as bn
from support import assert_same_buffers, copied_buffers, network_with_domains, randn

pytestmark = [pytest.mark.compile, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
KINDS = [bn.BatchNorm1d, nn.BatchNorm1d]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=32):
        yield
    torch._dynamo.reset()


def rows(mean=4):
    return randn(16, 2, dtype=torch.float64) + mean


CONTEXTS = {
    "no updates": bn.no_stat_updates,
    "adapt to a loader": lambda model: bn.adapt(model, [rows(9)]),
    "adapt to another": lambda model: bn.adapt(model, [rows(7)]),
    "adapt to each batch": bn.adapt,
    "domain a": lambda model: bn.use_domain(model, "a"),
    "domain b": lambda model: bn.use_domain(model, "b"),
    "accumulate": bn.accumulate,
}
OF_TORCH = ["no updates", "adapt to a loader", "adapt to another", "adapt to each batch"]


def outputs(model, forward, training, contexts):
    """Return the output and the buffers without a context, within each of them, and without one again."""
    found = []
    for context in (None, *contexts, None):
        model.train(training)
        if context is None:
            y = forward(rows())
        else:
            with CONTEXTS[context](model):
                y = forward(rows())
        found.append((y.detach(), copied_buffers(model)))
    return found


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_without_breaks_is_right_in_each_context_and_compiled_once_for_each(kind, training):
    contexts = list(CONTEXTS) if kind is bn.BatchNorm1d else OF_TORCH
    model, counter = network_with_domains(kind), CompileCounter()
    eager = copy.deepcopy(model)
    expected = outputs(eager, eager, training, contexts)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for (y, buffers), (of_eager, of_its) in zip(outputs(model, compiled, training, contexts), expected, strict=True):
        torch.testing.assert_close(y, of_eager, rtol=1e-12, atol=1e-12)
        for name, values in of_its.items():
            torch.testing.assert_close(buffers[name], values, rtol=1e-12, atol=1e-12)
    count = counter.frame_count
    outputs(model, compiled, training, contexts)
    assert counter.frame_count == count


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_code_is_right_in_each_thread(kind):
    model = network_with_domains(kind).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    names = ["no updates", "adapt to a loader", "adapt to another"]
    names += ["domain a", "domain b"] if kind is bn.BatchNorm1d else []
    expected = {name: y for name, (y, _) in zip(names, outputs(model, model, False, names)[1:-1], strict=True)}
    before, found = copied_buffers(model), {}
    barrier = threading.Barrier(len(names))

    def work(name):
        with CONTEXTS[name](model):
            barrier.wait(60)
            for _ in range(20):
                found.setdefault(name, []).append(compiled(rows()))

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert len(found[name]) == 20, name
        for y in found[name]:
            torch.testing.assert_close(y, expected[name], rtol=1e-12, atol=1e-12)
    assert_same_buffers(model, before)


@torch.no_grad()  # or the compiler warns that the input of the second block is no leaf
@pytest.mark.parametrize("context", ["no updates", "domain a"])
def test_equal_blocks_that_are_compiled_one_by_one_share_a_compilation_in_a_context(context):
    blocks, counter = [nn.Sequential(nn.Linear(2, 2), bn.BatchNorm1d(2)).double() for _ in range(4)], CompileCounter()
    model = bn.add_domains(nn.Sequential(*blocks), ["a"])
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    model(rows())
    for count in (2, 2):
        with CONTEXTS[context](model):
            model(rows())
        assert counter.frame_count == count


def test_a_model_that_is_deleted_while_adapted_leaves_the_stance_of_the_compiler():
    model, counter = network_with_domains(bn.BatchNorm1d).eval(), CompileCounter()
    bn.adapt(model)
    del model
    gc.collect()
    torch.compile(network_with_domains(bn.BatchNorm1d), backend=counter)(rows())
    assert counter.frame_count == 1


def test_threads_that_adapt_to_each_batch_leave_the_stance_of_the_compiler():
    model, barrier = network_with_domains(bn.BatchNorm1d).eval(), threading.Barrier(4)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)

    def work(count):
        for _ in range(count):  # so that they end in another order than they began
            with bn.adapt(model):
                compiled(rows())
        barrier.wait(60)

    threads = [threading.Thread(target=work, args=(count,)) for count in (1, 7, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.frame_count == 0
    compiled(rows())
    assert counter.frame_count == 1
