"""Gradient descent on a linear neuron with two weights."""

import math

import numpy as np
import pytest

from batchnorm.lab.claims.descent import descent, loss_surface, steps_to_minimum


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    x = np.stack([generator.normal(7, 1, 50), generator.normal(20, 6, 50)], axis=1)
    y = x[:, 0] + 0.05 * x[:, 1] + generator.normal(0, 0.5, 50)
    return x, (y - y.mean()) / y.std()


def loss(x, y, w):
    return float(np.mean((x @ w - y) ** 2))


def test_the_number_of_steps_is_that_of_gradient_descent(rows):
    x, y = rows
    rate = 1 / np.linalg.eigvalsh(2 * x.T @ x / len(x)).max()
    least = loss(x, y, np.linalg.lstsq(x, y, rcond=None)[0])
    start = loss(x, y, np.zeros(2))
    w, steps = np.zeros(2), 0
    while loss(x, y, w) - least > 0.01 * (start - least):
        w = w - rate * 2 * x.T @ (x @ w - y) / len(x)
        steps += 1
    assert steps > 100
    assert steps_to_minimum(x, y) == steps


def test_scaling_a_column_up_costs_steps_that_normalizing_saves(rows):
    x, y = rows
    normalized = (x - x.mean(0)) / x.std(0)
    assert steps_to_minimum(x * [1, 10], y) > 10 * steps_to_minimum(x, y) > 100 * steps_to_minimum(normalized, y)


def test_one_column_that_explains_everything_takes_one_step():
    assert steps_to_minimum(np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]]), np.array([1.0, -1, 0, 0])) == 1
    assert steps_to_minimum(np.ones((4, 2)), np.zeros(4)) == 0


def test_the_path_is_that_of_gradient_descent_and_ends_at_the_minimum(rows):
    x, y = rows
    steps, path = descent(x, y)
    rate = 1 / np.linalg.eigvalsh(2 * x.T @ x / len(x)).max()
    w = np.zeros(2)
    assert steps[:5].tolist() == [0, 1, 2, 3, 4]
    assert steps[-1] == steps_to_minimum(x, y)
    for point in path[:5]:
        np.testing.assert_allclose(point, w, rtol=1e-9, atol=1e-12)
        w = w - rate * 2 * x.T @ (x @ w - y) / len(x)
    least = loss(x, y, np.linalg.lstsq(x, y, rcond=None)[0])
    assert loss(x, y, path[-1]) - least <= 0.0101 * (loss(x, y, np.zeros(2)) - least)


def test_the_surface_is_the_loss_and_the_condition_number_that_of_its_hessian(rows):
    x, y = rows
    surface = loss_surface(x, y)
    for i, j in [(0, 0), (7, 30), (40, 40)]:
        assert surface.loss[j][i] == pytest.approx(loss(x, y, np.array([surface.x[i], surface.y[j]])))
    assert surface.condition == pytest.approx(np.linalg.cond(2 * x.T @ x / len(x)))
    assert math.isclose(np.min(surface.loss), loss(x, y, np.array(surface.minimum)), rel_tol=1e-6)
