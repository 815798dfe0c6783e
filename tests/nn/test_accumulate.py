"""Micro-batches whose statistics are pooled into one update."""

import copy
import math
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from support import PassThroughMode, copied_buffers, norm_layers

# Gradient-free sums of at most a few hundred numbers of size 10 or less: float32 errs by less than 1e-5 of them.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def micro_batches(*counts, channels=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, channels, generator=generator) * (i + 1) + i for i, count in enumerate(counts)]


def network(**options):
    torch.manual_seed(0)
    norms = bn.BatchNorm1d(5, **options), bn.BatchNorm1d(3, **options)
    return nn.Sequential(nn.Linear(4, 5), norms[0], nn.Tanh(), nn.Linear(5, 3), norms[1], nn.Tanh())


def watched(model):
    """Return a list per layer, to which the inputs of later forwards are added."""
    seen = [[] for _ in norm_layers(model)]
    for layer, inputs in zip(norm_layers(model), seen, strict=True):
        layer.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0].detach()))
    return seen


def moved(old_mean, old_var, values, share, *, unbiased=True):
    """Return the running statistics after one update by the values (M, C), in float64."""
    values = values.double()
    mean = values.mean(0)
    var = ((values - mean) ** 2).sum(0) / (len(values) - unbiased)
    return (1 - share) * old_mean + share * mean, (1 - share) * old_var + share * var


def assert_moved_once(layer, values, before=(0.0, 1.0), share=0.1, *, unbiased=True, counted=1):
    mean, var = moved(*before, values, share, unbiased=unbiased)
    torch.testing.assert_close(layer.running_mean.double(), mean, **CLOSE)
    torch.testing.assert_close(layer.running_var.double(), var, **CLOSE)
    assert int(layer.num_batches_tracked) == counted


@pytest.mark.parametrize("counts", [(4, 4, 4), (8, 3, 5, 2), (6,)], ids=str)
def test_each_layer_moves_once_by_the_moments_of_all_it_saw(counts):
    model = network()
    seen = watched(model)
    with bn.accumulate(model):
        for x in micro_batches(*counts):
            model(x)
    for layer, inputs in zip(norm_layers(model), seen, strict=True):
        assert_moved_once(layer, torch.cat(inputs))


@pytest.mark.parametrize("momentum", [0.3, 1 / 3, None], ids=str)
def test_the_update_has_the_weight_that_momentum_gives_one_batch(momentum):
    layer = bn.BatchNorm1d(4, momentum=momentum)
    layer(*micro_batches(7, seed=1))
    before = layer.running_mean.double(), layer.running_var.double()
    parts = micro_batches(5, 4)
    with bn.accumulate(layer):
        for x in parts:
            layer(x)
    share = 1 / 2 if momentum is None else momentum
    assert_moved_once(layer, torch.cat(parts), before, share, counted=2)


def test_a_layer_that_keeps_the_biased_variance_gets_the_biased_one_of_all():
    layer, parts = bn.BatchNorm1d(4, unbiased=False), micro_batches(3, 2)
    with bn.accumulate(layer):
        for x in parts:
            layer(x)
    assert_moved_once(layer, torch.cat(parts), unbiased=False)


def test_only_values_that_count_are_pooled():
    layer = bn.BatchNorm1d(4)
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(3, 4, length, generator=generator) + length for length in (5, 8, 2)]
    masks = [torch.rand(3, x.shape[2], generator=generator) < 0.6 for x in parts]
    masks[2] = torch.tensor([[True, False]])  # of size 1 along the samples
    with bn.accumulate(layer):
        for x, mask in zip(parts, masks, strict=True):
            layer(x.masked_fill(~mask.unsqueeze(1), torch.nan), mask=mask)
    counted = [x.movedim(1, 2)[mask.expand(3, -1)] for x, mask in zip(parts, masks, strict=True)]
    assert_moved_once(layer, torch.cat(counted))


def test_a_micro_batch_in_which_nothing_counts_changes_nothing():
    layer, parts = bn.BatchNorm1d(4), micro_batches(3, 5)
    with bn.accumulate(layer):
        layer(parts[0])
        layer(torch.full((6, 4), torch.nan), mask=torch.zeros(6, dtype=torch.bool))
        layer(parts[1])
    assert_moved_once(layer, torch.cat(parts))
    assert int(layer.skipped_batches) == 0


@pytest.mark.parametrize(("options", "shape"), [({}, (6, 4, 3, 2)), ({"channel_dim": -1}, (6, 3, 2, 4))], ids=str)
def test_positions_are_pooled_too(options, shape):
    layer, generator = bn.BatchNorm2d(4, **options), torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) + torch.arange(6.0).view(-1, 1, 1, 1)
    with bn.accumulate(layer):
        for part in x.split([1, 3, 2]):
            with pytest.warns(UserWarning, match="one sample") if len(part) == 1 else nullcontext():
                layer(part)
    channels_last = x if options else x.movedim(1, -1)
    assert_moved_once(layer, channels_last.reshape(-1, 4))


@pytest.mark.parametrize("options", [{"virtual_batch_size": 2}, {"renorm": bn.Renorm(2.0, 1.0)}], ids=str)
def test_virtual_batches_and_renorm_pool_what_the_layer_saw(options):
    model = network(**options)
    seen = watched(model)
    with bn.accumulate(model):
        for x in micro_batches(7, 3, 6):
            model(x)
    for layer, inputs in zip(norm_layers(model), seen, strict=True):
        assert_moved_once(layer, torch.cat(inputs))


def test_a_layer_used_twice_pools_both_uses():
    layer = bn.BatchNorm1d(4)
    seen, parts = watched(layer), micro_batches(4, 6)
    with bn.accumulate(layer):
        for x in parts:
            layer(torch.tanh(layer(x)) * 3 + 1)
    assert [len(inputs) for inputs in seen] == [4]
    assert_moved_once(layer, torch.cat(seen[0]))


def test_a_layer_that_two_places_of_the_model_share_is_committed_once():
    layer, parts = bn.BatchNorm1d(4), micro_batches(4, 6)
    model = nn.ModuleDict({"one": layer, "other": layer})
    with bn.accumulate(model):
        model["one"](parts[0])
        model["other"](parts[1])
    assert_moved_once(layer, torch.cat(parts))


def test_a_non_finite_micro_batch_is_left_out_and_counted():
    layer, parts = bn.BatchNorm1d(4), micro_batches(4, 5, 6)
    parts[1][2, 3] = torch.inf
    with bn.accumulate(layer):
        for x in parts:
            layer(x)
    assert_moved_once(layer, torch.cat([parts[0], parts[2]]))
    assert int(layer.skipped_batches) == 1


def test_where_no_micro_batch_is_finite_nothing_moves_and_all_are_counted():
    layer = bn.BatchNorm1d(4)
    layer(*micro_batches(5))
    before = copied_buffers(layer)
    with bn.accumulate(layer):
        for value in (torch.inf, torch.nan, -torch.inf):
            layer(torch.full((4, 4), value))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(layer.get_buffer(name), before[name])
    assert int(layer.skipped_batches) == 3


def test_a_non_finite_micro_batch_poisons_a_layer_that_propagates():
    layer, parts = bn.BatchNorm1d(4, nonfinite="propagate"), micro_batches(4, 5)
    parts[1][2, 3] = torch.inf
    with bn.accumulate(layer):
        for x in parts:
            layer(x)
    assert layer.running_mean.isfinite().tolist() == [True, True, True, False]
    assert int(layer.num_batches_tracked) == 1


def test_a_float64_layer_pools_what_float32_could_not_hold():
    layer, parts = bn.BatchNorm1d(4).double(), [x.double() * 1e30 for x in micro_batches(4, 5)]
    with bn.accumulate(layer):
        for x in parts:
            layer(x)
    mean, var = moved(0.0, 1.0, torch.cat(parts), 0.1)
    # float64 moments of nine numbers
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-12, atol=0)


def test_means_far_from_zero_keep_their_variance():
    layer = bn.BatchNorm1d(4, momentum=None)
    parts = [x + 1e4 for x in micro_batches(4, 5, 6)]
    with bn.accumulate(layer):
        for x in parts:
            layer(x)
    _, var = moved(0.0, 1.0, torch.cat(parts), 1.0)
    # moments are float64, so that only the rounding of the result is float32's
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-6, atol=0)


def test_bfloat16_micro_batches_are_pooled_in_float():
    layer, parts = bn.BatchNorm1d(4), [x.bfloat16() for x in micro_batches(4, 5)]
    with bn.accumulate(layer):
        for x in parts:
            layer(x)
    assert_moved_once(layer, torch.cat(parts))


def test_outputs_and_gradients_stay_those_of_each_micro_batch():
    model, stock = network(), network()
    for index, norm in ((1, nn.BatchNorm1d(5)), (4, nn.BatchNorm1d(3))):
        stock[index] = norm
    for x in micro_batches(4, 5, 6):
        with bn.accumulate(model):
            y = model(x)
            y.square().sum().backward()
        expected = stock(x)
        expected.square().sum().backward()
        torch.testing.assert_close(y, expected, **CLOSE)
    for mine, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        # the gradients are sums of some 50 terms of size 10, in float32
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_until_the_end_nothing_moves():
    model = network()
    before = copied_buffers(model)
    with bn.accumulate(model):
        for x in micro_batches(4, 5):
            model(x)
        for name, value in before.items():
            assert torch.equal(model.get_buffer(name), value), name


def test_after_it_each_batch_moves_the_statistics_again():
    layer, twin, (first, second) = bn.BatchNorm1d(4), bn.BatchNorm1d(4), micro_batches(4, 5)
    with bn.accumulate(layer):
        layer(first)
    twin(first)
    layer(second)
    twin(second)
    assert int(layer.num_batches_tracked) == 2
    torch.testing.assert_close(layer.running_mean, twin.running_mean, **CLOSE)
    torch.testing.assert_close(layer.running_var, twin.running_var, **CLOSE)


def test_two_accumulations_are_two_updates_and_share_nothing():
    layer, (first, second) = bn.BatchNorm1d(4), micro_batches(4, 5)
    with bn.accumulate(layer):
        layer(first)
    before = layer.running_mean.double(), layer.running_var.double()
    with bn.accumulate(layer):
        layer(second)
    assert_moved_once(layer, second, before, counted=2)


def test_an_exception_within_commits_nothing():
    model = network()
    before = copied_buffers(model)

    def fail():
        with bn.accumulate(model):
            model(*micro_batches(4))
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        fail()
    for name, value in before.items():
        assert torch.equal(model.get_buffer(name), value), name
    with bn.accumulate(model):  # the pooled moments are dropped
        pass
    assert int(model[1].num_batches_tracked) == 0


def test_a_layer_that_saw_nothing_stays_as_it_is():
    model = network()
    with bn.accumulate(model):
        model[:3](*micro_batches(4))
    assert [int(layer.num_batches_tracked) for layer in norm_layers(model)] == [1, 0]


@pytest.mark.parametrize("hold", [nn.Module.eval, bn.freeze], ids=["eval", "frozen"])
def test_layers_that_do_not_learn_are_not_moved(hold):
    model = hold(network())
    before = copied_buffers(model)
    with bn.accumulate(model):
        model(*micro_batches(4))
    for name, value in before.items():
        assert torch.equal(model.get_buffer(name), value), name


def test_forwards_within_no_stat_updates_are_not_pooled():
    layer, (first, second) = bn.BatchNorm1d(4), micro_batches(4, 5)
    with bn.accumulate(layer):
        layer(first)
        with bn.no_stat_updates(layer):
            layer(second)
    assert_moved_once(layer, first)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_micro_batches_are_pooled_once(use_reentrant):
    model = network()
    parts = [x.requires_grad_() for x in micro_batches(3, 8, 5)]
    with bn.accumulate(model):
        for x in parts:
            checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    first = torch.cat([model[0](x) for x in parts]).detach()
    assert_moved_once(model[1], first)
    second = torch.cat(
        [model[3](torch.tanh(nn.functional.batch_norm(model[0](x), None, None, training=True))) for x in parts]
    )
    assert_moved_once(model[4], second.detach())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_recomputed_after_the_end_moves_nothing_more(use_reentrant):
    model = network()
    with bn.accumulate(model):
        y = checkpoint(model, micro_batches(8)[0].requires_grad_(), use_reentrant=use_reentrant)
    before = copied_buffers(model)
    y.square().sum().backward()
    for name, value in before.items():
        assert torch.equal(model.get_buffer(name), value), name


def test_a_checkpoint_of_before_recomputed_within_is_not_pooled():
    layer, (first, second) = bn.BatchNorm1d(4), micro_batches(4, 5)
    y = checkpoint(layer, first.requires_grad_(), use_reentrant=False)
    before = layer.running_mean.double(), layer.running_var.double()
    with bn.accumulate(layer):
        y.square().sum().backward()
        layer(second)
    assert_moved_once(layer, second, before, counted=2)


def test_micro_batches_that_go_through_the_operators_are_pooled():
    layer, parts = bn.BatchNorm1d(4, virtual_batch_size=2), micro_batches(5, 4)
    with bn.accumulate(layer), PassThroughMode():
        for x in parts:
            layer(x)
    assert_moved_once(layer, torch.cat(parts))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch itself uses deprecated functions
def test_micro_batches_of_a_compiled_layer_are_pooled():
    torch._dynamo.reset()
    layer, parts = bn.BatchNorm1d(4), micro_batches(5, 5)
    compiled = torch.compile(layer, backend="aot_eager")
    with bn.accumulate(layer):
        for x in parts:
            compiled(x)
    assert_moved_once(layer, torch.cat(parts))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 3}, {"nonfinite": "propagate"}], ids=str)
def test_a_compiled_layer_is_compiled_for_the_first_micro_batch_and_for_all_others(options):
    torch._dynamo.reset()
    counter = CompileCounter()
    layer, eager = bn.BatchNorm1d(4, **options), bn.BatchNorm1d(4, **options)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for seed in range(2):
        parts = micro_batches(*[5] * 12, seed=seed)
        parts[0][1, 2] = parts[7][0, 0] = math.nan if seed and not options else 1.0
        for norm, run in ((layer, compiled), (eager, eager)):
            with bn.accumulate(norm):
                for x in parts:
                    run(x)
    assert counter.frame_count == 2
    torch.testing.assert_close(layer.state_dict(), eager.state_dict(), **CLOSE)
    assert layer.skipped_batches == eager.skipped_batches


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_micro_batches_of_other_sizes_are_one_compilation_more():
    torch._dynamo.reset()
    counter = CompileCounter()
    layer, parts = bn.BatchNorm1d(4), micro_batches(5, 3, 9, 4, 6, 7)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for half in (parts[:3], parts[3:]):
        with bn.accumulate(layer):
            for x in half:
                compiled(x)
    assert counter.frame_count == 3
    assert int(layer.num_batches_tracked) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_what_is_pending_is_in_no_copy(copied):
    model = network()
    with bn.accumulate(model):
        model(*micro_batches(4))
        twin = copied(model)
        with bn.accumulate(twin):
            pass
        assert [int(layer.num_batches_tracked) for layer in norm_layers(twin)] == [0, 0]
        twin(*micro_batches(4))
        assert [int(layer.num_batches_tracked) for layer in norm_layers(twin)] == [1, 1]
    assert [int(layer.num_batches_tracked) for layer in norm_layers(model)] == [1, 1]


def test_what_is_pending_is_in_no_state_dict():
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with bn.accumulate(model):
        model(*micro_batches(4))
        within = model.state_dict()
        assert within.keys() == before.keys()
        for name, value in before.items():
            assert torch.equal(within[name], value), name


def test_a_state_dict_loaded_within_is_what_the_update_starts_from():
    layer, (first, second) = bn.BatchNorm1d(4), micro_batches(4, 5)
    other = bn.BatchNorm1d(4)
    other(second)
    with bn.accumulate(layer):
        layer(first)
        layer.load_state_dict(other.state_dict())
    before = other.running_mean.double(), other.running_var.double()
    assert_moved_once(layer, first, before, counted=2)


def test_nesting_raises_and_leaves_the_outer_at_work():
    model, x = network(), micro_batches(4)[0]
    with bn.accumulate(model):
        with pytest.raises(bn.InputError, match="nested"), bn.accumulate(model[1]):
            pass
        model(x)
    assert [int(layer.num_batches_tracked) for layer in norm_layers(model)] == [1, 1]


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 2), bn.BatchNorm1d(3, track_running_stats=False)],
    ids=["no layer", "one without running statistics"],
)
def test_a_model_without_layers_that_keep_statistics_raises(model):
    with pytest.raises(bn.InputError, match=f"{type(model).__name__} has none"), bn.accumulate(model):
        pass


def test_a_model_with_torchs_layers_too_raises_with_the_path_of_one():
    model = nn.Sequential(bn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3)))
    with pytest.raises(bn.InputError, match=r"torch's are updated .* 1\.0"), bn.accumulate(model):
        pass


def test_each_domain_is_updated_by_its_own_micro_batches():
    layer = bn.add_domains(bn.BatchNorm1d(4), ["real", "drawn"])
    real, drawn, none = micro_batches(4, 5, 6)
    with bn.accumulate(layer):
        with bn.use_domain(layer, "real"):
            layer(real)
        with bn.use_domain(layer, "drawn"):
            layer(drawn)
        layer(none)
    for name, values in (("_real", real), ("_drawn", drawn), ("", none)):
        mean, var = moved(0.0, 1.0, values, 0.1)
        torch.testing.assert_close(layer.get_buffer(f"running_mean{name}").double(), mean, **CLOSE)
        torch.testing.assert_close(layer.get_buffer(f"running_var{name}").double(), var, **CLOSE)
        assert int(layer.get_buffer(f"num_batches_tracked{name}")) == 1
