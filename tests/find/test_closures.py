"""Functions on an instance that hold parts of the model: a copy would go on using the original."""

from __future__ import annotations

import collections
import copy
import functools
import logging
import types
import weakref

import pytest
import torch
from torch import nn

from sw_transplant import convert, inspect_model
from sw_transplant.find.closures import stays_with_original
from sw_transplant.find.reach import reach
from tests.small_models import conv


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(conv(), nn.ReLU(), conv())


def closure(model):
    first, second, *_ = model
    model.forward = lambda x: second(first(x))


def default(model):
    def forward(x, parts=tuple(model)[:2]):
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


class Runner:
    """Any object that has got hold of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


class Slots:
    __slots__ = ("layer",)

    def __deepcopy__(self, memo):
        return self


def container(model):
    model.forward = (lambda parts: lambda x: parts["all"][0][1](parts["all"][0][0](x)))({"all": [tuple(model)[:2]]})


def method_of_an_object(model):
    run = Runner(model[0])
    model.forward = lambda x: torch.relu(run(x))


def partial_in_a_closure(model):
    run = functools.partial(torch.nn.Module.__call__, model[0])
    model.forward = lambda x: torch.relu(run(x))


def method_in_a_closure(model):
    run = model[0].forward
    model.forward = lambda x: torch.relu(run(x))


def weak_reference(model):
    model.first = weakref.ref(model[0])
    model.forward = types.MethodType(lambda self, x: torch.relu(self.first()(x)), model)


def shared_by_copies(model):
    held = Slots()
    held.layer = model[0]
    model.extra = held
    model.forward = types.MethodType(lambda self, x: torch.relu(self.extra.layer(x)), model)


def class_attribute(model):
    class Net(type(model)):
        first = model[0]

        def forward(self, x):
            return torch.relu(self.first(x))

    model.__class__ = Net


def class_forward(model):
    first = model[0]

    class Net(type(model)):
        def forward(self, x):
            return torch.relu(first(x))

    model.__class__ = Net


def class_helper(model):
    first = model[0]

    class Net(type(model)):
        def forward(self, x):
            return self.run(x)

        def run(self, x):
            return torch.relu(first(x))

    model.__class__ = Net


def outside_wrapper(model):
    layer = model[0]

    def logged(function):
        @functools.wraps(function)
        def run(self, x):
            return torch.relu(layer(x)) if x.shape[0] else function(self, x)

        return run

    class Net(type(model)):
        @logged
        def forward(self, x):
            return super().forward(x)

    model.__class__ = Net


def default_of_a_class(model):
    class Net(type(model)):
        def forward(self, x, *, parts=tuple(model)[:2]):
            return parts[1](parts[0](x))

    model.__class__ = Net


def hook(model):
    first = model[0]
    model.register_forward_hook(lambda module, inputs, output: torch.relu(first(*inputs)))


def hook_of_a_parameter(model):
    weight = model[0].weight
    model[0].bias.register_hook(lambda grad: grad * weight.abs().mean())


def attribute_of_a_function(model):
    def forward(x):
        return torch.relu(forward.layer(x))

    forward.layer = model[0]
    model.forward = forward


def global_variable(model):
    global HELD
    HELD = model[0]
    model.forward = lambda x: torch.relu(HELD(x))


class CopiedAsItIs(nn.Conv2d):
    def __deepcopy__(self, memo):
        return self


def says_how_it_is_copied(model):
    model[0].__class__ = CopiedAsItIs


def nothing_of_it(model):
    other = nn.ReLU()
    model.extra = lambda x: other(x)


def name_of_a_global_variable(model):
    """An attribute that is called like a global variable that holds a layer is another thing."""
    global HELD
    HELD = model[0]

    class Net(type(model)):
        def forward(self, x):
            return super().forward(x * self.HELD)

    model.__class__ = Net
    model.HELD = 1.0


SHARED_WITH_COPIES = [
    closure,
    default,
    nested,
    parameter,
    wrapped,
    container,
    method_of_an_object,
    partial_in_a_closure,
    method_in_a_closure,
    weak_reference,
    shared_by_copies,
    class_attribute,
    class_forward,
    class_helper,
    outside_wrapper,
    default_of_a_class,
    hook,
    hook_of_a_parameter,
    attribute_of_a_function,
    global_variable,
    says_how_it_is_copied,
]


@pytest.mark.parametrize("habit", SHARED_WITH_COPIES)
def test_what_a_copy_would_go_on_using_is_refused(habit) -> None:
    model = net()
    habit(model)
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"a copy would go on using it; pass inplace=True"):
        convert(model)
    assert list(model.modules()) == before


@pytest.mark.parametrize("habit", [bound, partial, nothing_of_it, name_of_a_global_variable])
def test_what_is_copied_with_the_model_is_fine(habit) -> None:
    model, x = net(), torch.randn(1, 4, 9, 9)
    habit(model)
    twin = copy.deepcopy(model)
    assert stays_with_original(twin, model) is None
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


@pytest.mark.parametrize("habit", [*SHARED_WITH_COPIES[:4], *SHARED_WITH_COPIES[5:-1]])
def test_in_place_a_layer_that_is_held_beside_is_left(habit) -> None:
    """Its replacement would be in the tree, and the layer itself go on being called."""
    model = net()
    habit(model)
    found = inspect_model(model)
    assert [match.path for match in found.matches] == ["2"]
    assert "would go on using it" in found.skipped[0].reason


def view_of_the_weight(model):
    model.kernel = model[0].weight.detach().view(4, 49)


def deep_inside(model):
    model.extra = {"layers": collections.deque([Runner(Runner(model[0]))])}


@pytest.mark.parametrize("habit", [view_of_the_weight, deep_inside])
def test_what_attributes_hold_is_found_wherever_it_is(habit) -> None:
    model = net()
    habit(model)
    assert "would go on using it" in inspect_model(model).skipped[0].reason


def test_a_logger_is_not_looked_into() -> None:
    """It leads to every logger of the program, of which a program has thousands, and their handlers."""
    logger = logging.getLogger("some.logger")
    assert list(reach({"logger": logger}, lambda _: False)) == [{"logger": logger}]
