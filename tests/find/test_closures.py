"""Functions on an instance that hold parts of the model: a copy would go on using the original."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from torch import nn

from sw_transplant import convert
from sw_transplant.find.closures import stays_with_original
from tests.small_models import conv


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(conv(), nn.ReLU())


def closure(model):
    first, second = model
    model.forward = lambda x: second(first(x))


def default(model):
    def forward(x, parts=tuple(model)):
        return parts[1](parts[0](x))

    model.forward = forward


def nested(model):
    inner = model[0]

    def first(x):
        return inner(x)

    model.forward = lambda x: torch.relu(first(x))


def parameter(model):
    weight = model[0].weight
    model.forward = lambda x: nn.functional.conv2d(x, weight, padding=3, groups=4)


def wrapped(model):
    """As tools do that time or log: the original's bound method in a closure."""
    original = model.forward
    model.forward = lambda x: original(x)


def bound(model):
    model.forward = types.MethodType(lambda self, x: self[1](self[0](x)), model)


def partial(model):
    model.forward = functools.partial(nn.Sequential.forward, model)


def nothing_of_it(model):
    other = nn.ReLU()
    model.extra = lambda x: other(x)


@pytest.mark.parametrize("habit", [closure, default, nested, parameter, wrapped])
def test_what_a_copy_would_go_on_using_is_refused(habit) -> None:
    model = net()
    habit(model)
    with pytest.raises(ValueError, match=r"model\.forward is a function that holds .* convert with inplace=True"):
        convert(model)


@pytest.mark.parametrize("habit", [bound, partial, nothing_of_it])
def test_what_is_copied_with_the_model_is_fine(habit) -> None:
    model, x = net(), torch.randn(1, 4, 9, 9)
    habit(model)
    assert stays_with_original(model) is None
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.zero_()
        assert not torch.equal(twin(x), model(x)), "the copy runs the original"


def test_in_place_the_function_goes_on_with_the_model() -> None:
    model, x = net(), torch.randn(1, 4, 9, 9)
    expected = model(x)
    wrapped(model)
    convert(model, inplace=True)
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert type(model[0]).__name__ == "ShiftwiseConv2d"
