"""Distances between normal distributions, against torch's divergences and numerical integration."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from batchnorm.statistics.distance import symmetrized_kl, wasserstein


def test_distances_equal_numerical_integrals():
    mean, var, other_mean, other_var = 0.5, 2.0, -1.0, 0.7
    z = np.linspace(-40, 40, 400_001)

    def log_density(mean, var):
        return -0.5 * (z - mean) ** 2 / var - 0.5 * np.log(2 * np.pi * var)

    p, q = log_density(mean, var), log_density(other_mean, other_var)
    both_directions = np.trapezoid((np.exp(p) - np.exp(q)) * (p - q), z)
    given = [torch.tensor([value], dtype=torch.float64) for value in (mean, var, other_mean, other_var)]
    # a smooth integrand that vanishes at both ends: the trapezoidal rule errs by less than 1e-9
    assert symmetrized_kl(*given).item() == pytest.approx(both_directions, rel=1e-9)
    # quantiles of normals differ by (mean - mean') + (sd - sd') * z_p; the mean of z_p^2 is 1
    levels = np.exp(log_density(0, 1)) * (1.5 + (np.sqrt(2.0) - np.sqrt(0.7)) * z) ** 2
    assert wasserstein(*given).item() == pytest.approx(np.sqrt(np.trapezoid(levels, z)), rel=1e-9)


def test_symmetrized_kl_is_the_sum_of_torchs_divergences_of_both_directions():
    mean, new_mean = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([0.5, 1.0, 4.0]).double()
    var, new_var = torch.tensor([1.0, 2.0, 0.1]).double(), torch.tensor([1.0, 0.3, 9.0]).double()
    one, other = Normal(mean, var.sqrt()), Normal(new_mean, new_var.sqrt())
    expected = kl_divergence(one, other) + kl_divergence(other, one)
    torch.testing.assert_close(symmetrized_kl(mean, var, new_mean, new_var), expected)


def test_a_constant_channel_is_infinitely_far_from_all_but_itself():
    zero, one = torch.zeros(1), torch.ones(1)
    assert symmetrized_kl(one, zero, one, zero) == 0
    assert symmetrized_kl(one, zero, zero, zero) == math.inf
