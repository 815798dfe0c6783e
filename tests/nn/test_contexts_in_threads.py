"""Contexts that many threads and tasks open on one model at once, each seeing only its own."""

import asyncio
import copy
import threading

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import copied_buffers, network_with_domains

THREADS, ROUNDS = 8, 100
LOADER = [torch.full((4, 2), 9.0, dtype=torch.float64) + torch.arange(4.0, dtype=torch.float64).unsqueeze(1)]


class Meeting(nn.Module):
    """Lets all threads meet in the middle of the forward, so that each is in its context while the others forward."""

    def __init__(self):
        super().__init__()
        self.barrier = None

    def forward(self, x):
        if self.barrier is not None:
            self.barrier.wait(60)
        return x

    def __deepcopy__(self, memo):
        return Meeting()


def network(kind=bn.BatchNorm1d):
    return network_with_domains(kind, Meeting()).eval()


def plain(_):
    return bn.no_stat_updates(nn.Sequential(bn.BatchNorm1d(2)))  # a context of another model


def both(model):
    """Adapt within a domain."""
    stack = bn.use_domain(model, "b")
    stack.__enter__()
    inner = bn.adapt(model, LOADER)

    class Both:
        def __enter__(self):
            inner.__enter__()

        def __exit__(self, *error):
            inner.undo()
            stack.__exit__(*error)

    return Both()


CONTEXTS = {
    "plain": plain,
    "adapt to a loader": lambda model: bn.adapt(model, LOADER),
    "adapt to each batch": bn.adapt,
    "domain a": lambda model: bn.use_domain(model, "a"),
    "domain b": lambda model: bn.use_domain(model, "b"),
    "no updates": bn.no_stat_updates,
    "adapt in a domain": both,
}
FOR_TORCH = ["plain", "adapt to a loader", "adapt to each batch", "no updates"]


def batches():
    return list(torch.randn(ROUNDS, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 + 3)


def run_threads(*works):
    """Run the functions, each in a thread, and return their results; an error of one is raised."""
    results = [None] * len(works)

    def run(index, work):
        try:
            results[index] = work()
        except BaseException as error:  # noqa: BLE001 (raised below, in the thread of the test)
            results[index] = error

    threads = [threading.Thread(target=run, args=each) for each in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def left_behind(model):
    """Return whatever a context could leave on a model."""
    return [
        (type(module), sorted(module.__dict__), len(module._forward_pre_hooks), len(module._forward_hooks))
        for module in model.modules()
    ], [module.active_domain for module in model.modules() if isinstance(module, bn.BatchNorm1d)]


@pytest.mark.parametrize("kind", [bn.BatchNorm1d, nn.BatchNorm1d], ids=["ours", "torch's"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_threads_in_different_contexts_get_the_outputs_that_each_gets_alone(kind, training):
    names = list(CONTEXTS) if kind is bn.BatchNorm1d else FOR_TORCH
    if training:
        names = [name for name in names if name.startswith(("adapt", "no"))]  # others do update statistics
    model, xs = network(kind), batches()
    expected = {}
    for name in names:
        alone = copy.deepcopy(model)
        with CONTEXTS[name](alone):
            alone.train(training)
            expected[name] = [alone(x) for x in xs]
    before, state = copied_buffers(model), left_behind(model)

    def work(name):
        wrong = 0
        for x, y in zip(xs, expected[name], strict=True):
            ready.wait(60)
            with CONTEXTS[name](model):
                ready.wait(60)  # now all contexts are open; measuring before it must not meet the barrier
                if ready.wait(60) == 0:
                    model.train(training)
                    model[1].barrier = meeting
                ready.wait(60)
                wrong += not torch.equal(model(x), y)
                if ready.wait(60) == 0:
                    model[1].barrier = None
                    model.eval()
                ready.wait(60)
        return wrong

    chosen = [names[i % len(names)] for i in range(THREADS)]
    ready, meeting = threading.Barrier(THREADS), threading.Barrier(THREADS)
    wrong = run_threads(*[lambda name=name: work(name) for name in chosen])
    assert dict(zip(chosen, wrong, strict=True)) == dict.fromkeys(chosen, 0)
    for name, values in before.items():
        assert torch.equal(values, dict(model.named_buffers())[name]), name
    assert left_behind(model) == state


def test_what_one_thread_accumulates_has_nothing_of_the_others():
    model, xs = network().train(), batches()
    alone = copy.deepcopy(model)
    with bn.accumulate(alone):
        expected = [alone(x) for x in xs]
    model[1].barrier = threading.Barrier(THREADS)

    def accumulate():
        with bn.accumulate(model):
            return [model(x) for x in xs]

    def paused():
        with bn.no_stat_updates(model):
            return [model(x + 100) for x in xs]

    found, *_ = run_threads(accumulate, *[paused] * (THREADS - 1))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    for name, values in copied_buffers(alone).items():
        assert torch.equal(values, dict(model.named_buffers())[name]), name


def test_accumulating_threads_commit_one_update_each():
    model, xs = network().train(), batches()
    model[1].barrier = threading.Barrier(THREADS)

    def accumulate():
        with bn.accumulate(model):
            for x in xs:
                model(x)

    run_threads(*[accumulate] * THREADS)
    alone = network().train()
    for _ in range(THREADS):
        with bn.accumulate(alone):
            for x in xs:
                alone(x)
    for name, values in copied_buffers(alone).items():
        assert torch.equal(values, dict(model.named_buffers())[name]), name


@pytest.mark.parametrize("kind", [bn.BatchNorm1d, nn.BatchNorm1d], ids=["ours", "torch's"])
def test_tasks_of_one_thread_in_different_contexts_get_the_outputs_of_each_alone(kind):
    names = list(CONTEXTS) if kind is bn.BatchNorm1d else FOR_TORCH
    model, xs = network(kind), batches()[:20]
    expected = {}
    for name in names:
        alone = copy.deepcopy(model)
        with CONTEXTS[name](alone):
            expected[name] = [alone(x) for x in xs]
    before, state = copied_buffers(model), left_behind(model)

    async def work(name):
        wrong = 0
        for x, y in zip(xs, expected[name], strict=True):
            with CONTEXTS[name](model):
                await asyncio.sleep(0)
                wrong += not torch.equal(model(x), y)
                await asyncio.sleep(0)
            await asyncio.sleep(0)
        return wrong

    async def main():
        return await asyncio.gather(*[work(name) for name in names * 2])

    assert asyncio.run(main()) == [0] * len(names) * 2
    for name, values in before.items():
        assert torch.equal(values, dict(model.named_buffers())[name]), name
    assert left_behind(model) == state


def test_threads_that_open_contexts_for_a_layer_and_new_ones_leave_no_trace_of_them():
    layer, failed = bn.BatchNorm1d(2), []

    def work():
        try:
            for _ in range(300):
                with bn.no_stat_updates(nn.ModuleList([layer, bn.BatchNorm1d(2)])):
                    pass
        except RuntimeError as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    with bn.no_stat_updates(layer):
        assert len(layer.step_state.key.groups) == 1
