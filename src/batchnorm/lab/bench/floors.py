"""Lower bounds of memory traffic, in passes over an array of x's size; a copy is 2 passes.

A pass reads or writes an array once. A written byte counts once, as with stores that bypass the cache. Forward reads x
for the moments, and again to normalize it. Backward reads x and dy for two sums, and again for dx. Second readings are
free if the values are still in the cache, and passes of their own otherwise. ReLU's mask is recomputed from x for free,
but after an addition it takes reading y, which the next layer keeps anyway. The gradient of the residual is
dz = dy * (y > 0), which backward writes. Where it needs x and dz a second time, it reads dz instead of dy and y.

=============  ===================================  =====================================
               still in the cache                   no longer in the cache
=============  ===================================  =====================================
eval           x, y                              2  x, y                                2
eval, add      x, r, y                           3  x, r, y                             3
forward        x, y                              2  x; x, y                             3
forward, add   x, r, y                           3  x; x, r, y                          4
backward       x, dy, dx                         3  x, dy; x, dy, dx                    5
backward, add  x, y, dy, dz, dx                  5  x, y, dy, dz; x, dz, dx             7
=============  ===================================  =====================================

The cache must hold all values between two readings of the same value: one channel in contiguous (N, C, L) order, all of
x where channels are the last dimension, (N, C) included. Backward must hold dy as well as x.
"""

from __future__ import annotations

from batchnorm.lab.bench.registry import OPERATIONS, Case

__all__ = ["floor", "ideal_bytes", "stays_in_cache"]

#            (in the cache, no longer there), by whether there is an addition
EVAL = {False: (2, 2), True: (3, 3)}
FORWARD = {False: (2, 3), True: (3, 4)}
BACKWARD = {False: (3, 5), True: (5, 7)}


def stays_in_cache(case: Case, cache: int, arrays: int) -> bool:
    """Tell whether values are still in a cache of this size in bytes at their second reading, if arrays are read."""
    channel_by_channel = case.layout == "contiguous" and len(case.shape) > 2
    return arrays * case.bytes <= cache * (case.shape[1] if channel_by_channel else 1)


def _passes(case: Case, cache: int) -> int:
    add = OPERATIONS[case.operation].residual
    if case.mode == "eval":
        return EVAL[add][0]
    forward = FORWARD[add][not stays_in_cache(case, cache, 1)]
    return forward if case.mode == "forward" else forward + BACKWARD[add][not stays_in_cache(case, cache, 2)]


def floor(case: Case, cache: int) -> float:
    """Return the lower bound of the time of a case, in copies of x, for a cache of this size in bytes."""
    return _passes(case, cache) / 2


def ideal_bytes(case: Case, cache: int) -> int:
    """Return the bytes that a case must at least read and write, for a cache of this size in bytes."""
    return _passes(case, cache) * case.bytes
