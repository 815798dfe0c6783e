import pytest

from batchnorm.lab.bench.floors import floor, ideal_bytes, stays_in_cache
from batchnorm.lab.bench.registry import Case

CACHE = 32 * 2**20
LARGE = (64, 64, 56, 56)


@pytest.mark.parametrize(
    ("operation", "mode", "contiguous", "channels_last"),
    [
        ("bn", "train", 2.5, 4.0),
        ("bn+relu", "train", 2.5, 4.0),
        ("bn+add+relu", "train", 4.0, 5.5),
        ("bn", "forward", 1.0, 1.5),
        ("bn+add+relu", "forward", 1.5, 2.0),
        ("bn+relu", "eval", 1.0, 1.0),
        ("bn+add+relu", "eval", 1.5, 1.5),
    ],
)
def test_the_floor_in_copies_is_that_of_the_passes_counted(operation, mode, contiguous, channels_last):
    assert floor(Case(operation, mode, "float32", LARGE), CACHE) == contiguous
    assert floor(Case(operation, mode, "float32", LARGE, "channels_last"), CACHE) == channels_last


def test_features_without_places_are_channels_last_already():
    assert floor(Case("bn", "train", "float32", (2**18, 64)), CACHE) == 4.0


def test_channels_last_and_small_is_still_in_the_cache_when_it_is_needed_again():
    assert floor(Case("bn", "train", "float32", (32, 512, 7, 7), "channels_last"), CACHE) == 2.5


def test_backward_has_to_keep_two_arrays_where_forward_keeps_one():
    case = Case("bn", "train", "float32", (2**17, 64))  # just the cache
    assert case.bytes == CACHE
    assert stays_in_cache(case, CACHE, 1)
    assert not stays_in_cache(case, CACHE, 2)
    assert floor(case, CACHE) == (2 + 5) / 2


def test_a_copy_is_two_passes_over_the_bytes_of_x():
    case = Case("bn", "train", "bfloat16", LARGE)
    assert ideal_bytes(case, CACHE) == 2.5 * 2 * 2 * 64 * 64 * 56 * 56
