"""batch_norm(): the statistics that it updates, and the arguments that it refuses."""

import pytest
import torch

import batchnorm as bn
from support import randn


def statistics():
    return torch.zeros(3), torch.ones(3)


def test_running_statistics_are_updated_as_torchs():
    x = torch.randn(8, 3, 4)
    ours, theirs = statistics(), statistics()
    bn.batch_norm(x, *ours, training=True, momentum=0.3)
    torch.nn.functional.batch_norm(x, *theirs, training=True, momentum=0.3)
    torch.testing.assert_close(ours, theirs)


def test_a_masked_batch_updates_them_as_its_kept_rows_alone_do():
    x = torch.randn(8, 3)
    mask = torch.tensor([True, True, False, True, False, True, True, True])
    masked, alone = statistics(), statistics()
    bn.batch_norm(x, *masked, training=True, mask=mask)
    bn.batch_norm(x[mask], *alone, training=True)
    torch.testing.assert_close(masked, alone)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_mask_that_keeps_one_row_or_none_updates_nothing(kept):
    mean, var = statistics()
    y = bn.batch_norm(torch.randn(8, 3), mean, var, training=True, mask=torch.arange(8) < kept)
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))
    assert y.isfinite().all()


def test_an_empty_batch_updates_nothing():
    mean, var = statistics()
    assert bn.batch_norm(torch.empty(0, 3), mean, var, training=True).shape == (0, 3)
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))


def test_inference_uses_and_keeps_the_running_statistics():
    mean, var = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 1.0, 9.0])
    y = bn.batch_norm(torch.tensor([[3.0, 2.0, 0.0]]), mean, var, eps=0.0)
    assert torch.equal(y, torch.tensor([[1.0, 0.0, -1.0]]))
    assert torch.equal(mean, torch.tensor([1.0, 2.0, 3.0]))


BAD = {
    "at least 2 dimensions": {"input": torch.randn(3)},
    "floating dtype; got torch.int64": {"input": torch.ones(4, 3, dtype=torch.long)},
    "3 channels .*; got 2": {"weight": torch.ones(2)},
    "residual must have .*got \\(4, 2\\)": {"residual": torch.ones(4, 2)},
    "mask must be bool and of shape \\(4,\\).*float32": {"mask": torch.ones(4)},
    "mask must be bool and of shape \\(4,\\).*\\(3,\\)": {"mask": torch.ones(3, dtype=torch.bool)},
    "activation must be None or one of relu.*got 'swish'": {"activation": "swish"},
    "activation must be None or one of relu.*got \\['relu'\\]": {"activation": ["relu"]},
    "momentum must be None or a number from 0 .*got -5": {"momentum": -5},
    "eps must be finite and at least 0; got -1": {"eps": -1},
    "more than 1 value per channel.*\\(1, 3\\)": {"input": torch.ones(1, 3)},
    "running_mean and running_var must be given": {"training": False},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_with_the_rule_and_the_value(message):
    arguments = {"input": torch.randn(4, 3), "running_mean": None, "running_var": None, "training": True} | BAD[message]
    with pytest.raises(bn.InputError, match=message):
        bn.batch_norm(**arguments)


@pytest.mark.parametrize(("name", "value", "type_name"), [("residual", 3.0, "float"), ("mask", "x", "str")])
def test_an_operand_that_is_no_tensor_is_refused(name, value, type_name):
    with pytest.raises(bn.InputTypeError, match=f"^{name} must be a tensor; got {type_name}$"):
        bn.batch_norm(torch.randn(4, 3), None, None, training=True, **{name: value})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["batch_norm", "normalize"])
def test_a_trace_computes_the_function(name):
    def traced(x):
        if name == "batch_norm":
            return bn.batch_norm(x, torch.zeros(3), torch.ones(3), training=True)
        return bn.normalize(x, bn.Stats(torch.zeros(3), torch.ones(3), torch.tensor(0)))[0]

    graph = torch.jit.trace(traced, randn(8, 3))
    x = 5 * randn(6, 3, seed=1)
    assert torch.equal(graph(x), traced(x))
