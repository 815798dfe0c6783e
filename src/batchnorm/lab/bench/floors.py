"""The least that each case must move through memory, in passes over an array of x's size; 2 passes are a copy.

A pass reads or writes an array once. A written byte counts once, as with stores that bypass the cache. Forward has to
read x for its moments and once more to normalise it, and backward has to read x and dy for two sums and once more for
dx: those second readings are free where the values are still in the cache, and are passes of their own where they
are not. ReLU's mask is recomputed from x at no cost; after an addition y, which the next layer keeps anyway, is read
for it. The gradient of the residual is dz = dy * (y > 0), which backward writes; where it needs x and dz a second time,
it reads what it wrote instead of dy and y.

=============  ===================================  =====================================
               still in the cache                   beyond it
=============  ===================================  =====================================
eval           x, y                              2  x, y                                2
eval, add      x, r, y                           3  x, r, y                             3
forward        x, y                              2  x; x, y                             3
forward, add   x, r, y                           3  x; x, r, y                          4
backward       x, dy, dx                         3  x, dy; x, dy, dx                    5
backward, add  x, y, dy, dz, dx                  5  x, y, dy, dz; x, dz, dx             7
=============  ===================================  =====================================

What must stay in the cache is what lies between two readings of a value: one channel in contiguous (N, C, L) order;
all of x where channels are the last dimension, (N, C) included. Backward has to keep dy beside x.
"""

from __future__ import annotations

from batchnorm.lab.bench.registry import OPERATIONS, Case

__all__ = ["floor", "ideal_bytes", "stays"]

#                      in the cache, beyond it
EVAL = {False: (2, 2), True: (3, 3)}
FORWARD = {False: (2, 3), True: (3, 4)}
BACKWARD = {False: (3, 5), True: (5, 7)}


def stays(case: Case, cache: int, arrays: int) -> bool:
    """Whether a value is still in a cache of so many bytes when it is needed again, that many arrays being read."""
    together = case.layout == "contiguous" and len(case.shape) > 2
    return arrays * case.bytes <= cache * (case.shape[1] if together else 1)


def _passes(case: Case, cache: int) -> int:
    add = OPERATIONS[case.operation].residual
    if case.mode == "eval":
        return EVAL[add][0]
    forward = FORWARD[add][not stays(case, cache, 1)]
    return forward if case.mode == "forward" else forward + BACKWARD[add][not stays(case, cache, 2)]


def floor(case: Case, cache: int) -> float:
    """The least time that the case can take, in copies of x, given a cache of so many bytes."""
    return _passes(case, cache) / 2


def ideal_bytes(case: Case, cache: int) -> int:
    """What the case must move through memory."""
    return _passes(case, cache) * case.bytes
