"""Each rank reads its share, and all get the numbers of one process that reads everything."""

import numpy as np

SHARES = """
generator = torch.Generator().manual_seed(0)
x = torch.randn(97, 4, generator=generator, dtype=torch.float64) * 3 + 1
shares = {1: [x], 2: [x[:60], x[60:]], 3: [x[:80], x[80:80], x[80:]]}[world]
batches = [part for part in shares[rank].split(16) if len(part)]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 6), bn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5), nn.BatchNorm1d(5)).double()
wrapped = DistributedDataParallel(model) if world > 1 else model
report = bn.recalibrate(wrapped, batches)
moments = bn.Moments.of(shares[rank]).all_reduce()
result = {
    "buffers": {name: values.tolist() for name, values in model.named_buffers()},
    "counts": [layer.count for layer in report.layers],
    "moments": [moments.count.item(), moments.mean.tolist(), moments.m2.tolist()],
}
"""


def test_ranks_with_different_shares_end_with_the_numbers_of_one_process(on_ranks):
    (alone,) = on_ranks(SHARES, 1)
    for world in (2, 3):
        ranks = on_ranks(SHARES, world)
        assert all(rank == ranks[0] for rank in ranks)
        assert ranks[0]["counts"] == alone["counts"] == [97, 97]
        for name, values in alone["buffers"].items():
            np.testing.assert_allclose(ranks[0]["buffers"][name], values, rtol=1e-12, atol=1e-12)
        for found, expected in zip(ranks[0]["moments"], alone["moments"], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_layers_that_only_some_ranks_use_are_recalibrated_on_all(on_ranks):
    code = """
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (bn.BatchNorm1d(2).double() for _ in range(3))

        def forward(self, x, kind):
            return self.c(torch.tanh((self.a if kind == "a" else self.b)(x)))

    model = Branches()
    kinds = {"a": torch.arange(10.0).double().view(5, 2), "b": torch.arange(8.0).double().view(4, 2) * 3}
    mine = [{"x": kinds[kind], "kind": kind} for kind in {1: "ab", 2: "ab"[rank]}[world]]
    report = bn.recalibrate(model, mine)
    result = {
        "layers": [layer.path for layer in report.layers],
        "buffers": {name: values.tolist() for name, values in model.named_buffers()},
    }
    """
    (alone,) = on_ranks(code, 1)
    assert sorted(alone["layers"]) == ["a", "b", "c"]
    for rank in on_ranks(code, 2):
        assert sorted(rank["layers"][:2]) == ["a", "b"]
        assert rank["layers"][2] == "c"
        for name, values in alone["buffers"].items():
            np.testing.assert_allclose(rank["buffers"][name], values, rtol=1e-12, atol=1e-12)


def test_synchronized_layers_do_not_wait_for_other_ranks(on_ranks):
    """Ranks have different numbers of batches, one of a single row, and a layer is used twice."""
    code = """
    layer = bn.BatchNorm1d(4, sync=True).double()
    generator = torch.Generator().manual_seed(rank)
    batches = [torch.randn(8, 4, generator=generator, dtype=torch.float64) for _ in range(2 + rank)]
    batches += [torch.randn(1, 4, generator=generator, dtype=torch.float64)] * rank
    once = bn.recalibrate(nn.Sequential(layer), batches, mode="at_once").layers[0].count
    mean = layer.running_mean.tolist()
    twice = bn.recalibrate(nn.Sequential(layer, nn.Tanh(), layer), batches).layers[0].count
    result = {"counts": [once, twice], "mean": mean, "sync": layer.sync}
    """
    ranks = on_ranks(code, 2)
    assert [rank["counts"] for rank in ranks] == [[41, 82]] * 2
    assert ranks[0]["mean"] == ranks[1]["mean"]
    assert all(rank["sync"] for rank in ranks)


def test_an_error_in_the_loader_of_one_rank_is_raised_on_all_and_changes_nothing(on_ranks):
    code = """
    import time
    def batches():
        yield torch.ones(4, 3)
        if rank == 1:
            raise OSError("disk gone")
    layer = bn.BatchNorm1d(3)
    began = time.perf_counter()
    try:
        bn.recalibrate(layer, batches())
        message = ""
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    result = {"message": message, "mean": layer.running_mean.tolist(), "seconds": time.perf_counter() - began}
    """
    first, second = on_ranks(code, 2)
    assert first["message"] == (
        "DistributedError: rank 1 of the group failed, so nothing was changed: OSError('disk gone')"
    )
    assert second["message"] == "OSError: disk gone"
    assert first["mean"] == second["mean"] == [0, 0, 0]
    assert first["seconds"] < 20  # the group's timeout is 30


def test_a_rank_outside_of_the_group_uses_its_own_data(on_ranks):
    code = """
    group = dist.new_group([0])
    x = torch.full((4, 2), float(rank)) + torch.arange(4.0).unsqueeze(1)
    layer = bn.BatchNorm1d(2)
    moments = bn.Moments.of(x).all_reduce(group)
    bn.pool_running_stats(layer, group)
    bn.recalibrate(layer, [x], group=group)
    result = {"moments": moments.mean.tolist(), "mean": layer.running_mean.tolist()}
    """
    for rank, found in enumerate(on_ranks(code, 2)):
        assert found["moments"] == found["mean"] == [1.5 + rank] * 2
