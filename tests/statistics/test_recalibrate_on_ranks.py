"""Each rank reads its share, and all end with the numbers of one process that reads everything."""

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
