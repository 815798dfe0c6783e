import re
import warnings

import pytest
from torch import nn

from batchnorm import errors

BUILT_IN = {
    "InputError": ValueError,
    "InputTypeError": TypeError,
    "UnsupportedError": RuntimeError,
    "DistributedError": RuntimeError,
    "MissingDependencyError": ImportError,
    "DivergedError": ArithmeticError,
    "DataError": ValueError,
    "RunError": RuntimeError,
    "KernelError": RuntimeError,
}


def test_the_tree_drawn_in_the_file_is_the_tree_of_the_classes():
    drawn = dict(re.findall(r"[|`]-- (\w+) \((\w+)\)", errors.__doc__))
    assert drawn == {name: built_in.__name__ for name, built_in in BUILT_IN.items()}


def test_no_error_is_missing_from_the_tree():
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes == {"BatchNormError", *BUILT_IN}


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_error_is_caught_as_the_root_and_as_the_built_in_error(name):
    for caught in (errors.BatchNormError, BUILT_IN[name]):
        with pytest.raises(caught, match=r"^the rule; got 3$"):
            raise getattr(errors, name)("the rule; got 3")


def test_a_warning_names_the_line_of_the_caller():
    namespace = {"__name__": "batchnorm.somewhere", "warn": errors.warn}
    exec("def inside():\n    warn('careful')", namespace)
    with pytest.warns(UserWarning, match="^careful$") as caught:
        namespace["inside"]()
    assert caught[0].filename == __file__


def test_a_warning_below_a_module_of_torch_names_the_line_of_the_caller():
    class Inside(nn.Module):
        __module__ = "batchnorm.somewhere"

    namespace = {"__name__": "batchnorm.somewhere", "warn": errors.warn}
    exec("def forward(self):\n    warn('careful')", namespace)
    Inside.forward = namespace["forward"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nn.Sequential()  # a module of torch is built without a warning
        Inside()()
    assert [each.filename for each in caught] == [__file__]
