"""Figures whose data are made by hand, and the data of a figure as a file."""

import dataclasses
import math

import numpy as np
import pytest

from batchnorm.lab.claims.inputs import InputsDetails, LossSurface
from batchnorm.lab.report.figures.downloads import Data
from batchnorm.lab.report.figures.inputs import inputs
from batchnorm.lab.report.figures.layers import density


def test_a_density_holds_the_share_of_the_distribution_that_its_bins_do():
    normal = np.sort(np.random.default_rng(0).normal(size=100_001))
    edges = np.linspace(-1, 1, 21)
    heights = density(np.quantile(normal, np.linspace(0, 1, 41)).tolist(), edges.tolist())
    assert np.sum(heights * np.diff(edges)) == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.01)


def valley(**changes):
    """Details of the inputs claim: a bowl and a long valley, both of one scale."""
    grid = np.linspace(-1, 1, 21)
    w1, w2 = np.meshgrid(grid, grid)

    def surface(steep):
        bowl = LossSurface(
            x=grid.tolist(),
            y=grid.tolist(),
            loss=(w1**2 * steep + w2**2 + 0.3).tolist(),
            path=[[0.9, 0.9], [0.0, 0.5], [0.0, 0.1]],
            path_steps=[0, 1, 40],
            minimum=[0.0, 0.0],
            condition=float(steep),
            steps=40.0,
        )
        return dataclasses.replace(bowl, **changes)

    return InputsDetails(columns=["a", "b"], told_apart="c", raw=surface(1000), normalized=surface(1))


def test_contours_lie_equal_factors_apart_above_the_minimum():
    surface = inputs(None, valley()).plots[0].surface
    factors = np.divide(surface.levels[1:], surface.levels[:-1])
    assert np.ptp(factors) == pytest.approx(0, abs=1e-9)
    assert np.min(surface.above) == 0


def test_weights_of_one_scale_are_drawn_to_one_scale_and_others_are_said_not_to_be():
    assert [plot.x.equal for plot in inputs(None, valley()).plots] == [True, True]
    other = inputs(None, valley(y=np.linspace(-1000, 1000, 21).tolist()))
    assert [plot.x.equal for plot in other.plots] == [False, False]
    assert "scales of their own" in other.note


def test_the_slider_of_gradient_descent_stops_at_the_steps_of_its_path():
    (slider,) = inputs(None, valley()).controls
    assert [label for _, label in slider.options] == ["step 0", "step 1", "step 40"]


def test_a_word_that_a_spreadsheet_would_calculate_is_quoted_and_a_number_is_not():
    data = Data("x", ["=a", "b"], [["+1", -1.5], ["@x", None], ["\t=1", math.inf], ["plain", 3]])
    assert data.csv() == "'=a,b\n'+1,-1.5\n'@x,\n'\t=1,inf\nplain,3\n"
