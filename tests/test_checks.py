import numpy as np
import pytest

from batchnorm import checks
from batchnorm.errors import InputError
from batchnorm.kernels.reference import ACTIVATIONS


@pytest.mark.parametrize(
    ("value", "real", "whole"),
    [
        (3, True, True),
        (np.int64(3), True, True),
        (0.5, True, False),
        (np.float32(0.5), True, False),
        (float("inf"), True, False),
        (float("nan"), False, False),
        (True, False, False),
        ("3", False, False),
        (None, False, False),
    ],
)
def test_which_values_are_numbers(value, real, whole):
    assert (checks.is_real(value), checks.is_whole(value)) == (real, whole)


def test_the_names_of_the_activations_are_those_that_the_kernels_know():
    assert tuple(ACTIVATIONS) == checks.ACTIVATION_NAMES


@pytest.mark.parametrize("momentum", [None, 0, 0.5, 1, np.float32(0.1)])
def test_a_momentum_in_range_passes(momentum):
    checks.check_momentum(momentum)


@pytest.mark.parametrize("momentum", [-0.1, float("inf"), float("nan"), "0.1", True])
def test_a_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(InputError, match=r"momentum must be None or a number from 0 .*; got "):
        checks.check_momentum(momentum)


@pytest.mark.parametrize("eps", [-1e-5, float("inf"), float("nan"), "1e-5"])
def test_an_eps_out_of_range_is_refused(eps):
    with pytest.raises(InputError, match="eps must be finite and at least 0; got "):
        checks.check_numbers(0.1, eps, None)
