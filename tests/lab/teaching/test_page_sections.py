"""The sections of the explain page: a swapped row, inference, and the numbers that a layer keeps."""

import numpy as np
import pytest
import torch

import batchnorm as bn
from batchnorm.lab.teaching.worked_example import NOTES, worked_example
from explain_support import expected

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("placement", ["before", "after"])
def test_another_row_in_one_place_changes_every_z_hat(visit, placement):
    visit.choose("placement", placement)
    visit.choose("swapped", 1)
    visit.type("other.0", "5.9")
    visit.type("other.1", "106")
    rows = [NOTES.features[0], (5.9, 106), *NOTES.features[2:]]
    was, now = expected(placement).training, expected(placement, features=rows).training
    assert visit.numbers("swap.was") == pytest.approx(was.z_hat.flatten().tolist(), abs=1e-4)
    assert visit.numbers("swap.is") == pytest.approx(now.z_hat.flatten().tolist(), abs=1e-4)
    assert visit.numbers("swap.change") == pytest.approx((now.z_hat - was.z_hat).flatten().tolist(), abs=1e-4)
    assert visit.number("swap.change.mean") == pytest.approx((now.mean - was.mean).item(), abs=1e-4)
    assert visit.number("swap.change.sd") == pytest.approx((now.sd - was.sd).item(), abs=1e-4)
    assert visit.text("swap.says").startswith("All 3 remaining rows have another ẑ")
    assert "Row 2 (cgpa 6.2, iq 89) swapped for cgpa 5.9, iq 106" in visit.text("swap.caption")


def test_a_row_swapped_for_itself_changes_nothing_and_that_is_said(visit):
    visit.choose("other", "same")
    assert visit.numbers("swap.change") == [0, 0, 0, 0]
    assert "changes neither the mean nor the variance" in visit.text("swap.says")


def test_an_outlier_lies_four_standard_deviations_below_the_mean(visit):
    visit.choose("other", "outlier")
    x = np.array(NOTES.features)
    wanted = x.mean(axis=0) - 4 * x.std(axis=0)
    found = [float(visit.input(f"other.{j}").input_value()) for j in range(2)]
    assert found == pytest.approx(wanted.tolist(), abs=0.5)
    assert visit.number("swap.is.3") < -1.5


@pytest.mark.parametrize("placement", ["before", "after"])
@torch.no_grad()
def test_inference_uses_the_running_statistics_after_as_many_batches(visit, placement):
    visit.choose("placement", placement)
    visit.page.focus("#batches-slider")
    for _ in range(4):
        visit.page.keyboard.press("ArrowRight")
    start = expected(placement)
    layer = bn.BatchNorm1d(1, dtype=torch.float64)
    for _ in range(5):
        layer(start.z)
    inference = bn.explain(layer, start.z).inference
    assert visit.input("batches").input_value() == "5"
    assert visit.number("running.mean") == pytest.approx(layer.running_mean.item(), abs=1e-4)
    assert visit.number("running.var") == pytest.approx(layer.running_var.item(), abs=1e-4)
    assert visit.numbers("inference.was") == pytest.approx(start.training.z_hat.flatten().tolist(), abs=1e-4)
    assert visit.numbers("inference.is") == pytest.approx(inference.z_hat.flatten().tolist(), abs=1e-4)
    assert visit.number("kept.mean") == visit.number("running.mean")
    assert visit.number("kept.var") == visit.number("running.var")


def test_before_the_first_batch_the_running_statistics_are_0_and_1(visit):
    visit.type("batches", "0")
    assert (visit.number("running.mean"), visit.number("running.var")) == (0, 1)
    assert visit.text("running.mean.sum") == "at the start"


@torch.no_grad()
def test_a_new_row_alone_is_calculated_at_inference(visit):
    visit.type("single.0", "6.8")
    visit.type("single.1", "123")
    layer = bn.BatchNorm1d(1, dtype=torch.float64, activation="sigmoid")
    layer(expected().z)
    alone = bn.explain(layer, torch.tensor([[3.1], [3.1]], dtype=torch.float64)).inference
    assert visit.number("single.input") == pytest.approx(3.1)
    assert visit.number("single.zHat") == pytest.approx(alone.z_hat[0].item(), abs=1e-4)
    assert visit.number("single.output") == pytest.approx(alone.output[0].item(), abs=1e-5)


def test_four_numbers_a_neuron_two_of_them_learned(visit):
    visit.type("neurons", "256")
    visit.type("gamma", "1.5")
    assert visit.text("kept.says").startswith("256 · 4 = 1024 numbers, 512 of them learned")
    assert visit.page.locator(".cards dd").count() == 4
    assert visit.number("kept.gamma") == 1.5
    assert "4 numbers per neuron" in visit.page.text_content("#kept")


def test_the_gradient_step_moves_gamma_and_beta_and_lowers_the_loss(visit):
    step = worked_example().before.step
    loss = visit.number("step.loss")
    visit.page.click("#step")
    assert float(visit.input("gamma").input_value()) == pytest.approx(step.gamma.new, rel=1e-8)
    assert float(visit.input("beta").input_value()) == pytest.approx(step.beta.new, rel=1e-8)
    assert visit.number("step.loss") == pytest.approx(step.loss.new, abs=1e-5)
    assert visit.number("step.loss") < loss


def test_the_bound_and_the_largest_z_hat_are_said(visit):
    said = visit.text("before.bound")
    assert "for m = 4 rows |ẑ| ≤ √(m - 1) = 1.7321. The largest here is 1.1949, of row 1." in said
