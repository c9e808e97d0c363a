"""The proof of a site: whatever a site does beside the sum that reading found is seen, told, and leaves it as it is."""

from __future__ import annotations

import itertools
import random
import re
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sw_transplant import SWConfig, convert, inspect_model
from sw_transplant.find.match import Inspection
from tests.small_models import conv, conv_bn


class Block(nn.Module):
    """A sum of two branches; subclasses do something beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = conv_bn(size=9), conv_bn(size=5)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) + self.small(x)


class AddsIntoItsInput(Block):
    """Read as the input plus two branches, which it is: but its input is changed."""

    def forward(self, x):
        x += self.large(x) + self.small(x)
        return x


class DrawsInPython(Block):
    def forward(self, x):
        random.random()
        return super().forward(x)


class DrawsInNumPy(Block):
    def forward(self, x):
        np.random.rand()
        return super().forward(x)


class DrawsInTorch(Block):
    def forward(self, x):
        torch.rand(1)
        return super().forward(x)


class DrawsFromItsOwn(Block):
    def __init__(self):
        super().__init__()
        self.generator = random.Random(3)

    def forward(self, x):
        self.generator.random()
        return super().forward(x)


class CountsItsCalls(Block):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class CountsInItsClass(Block):
    seen: ClassVar[list[int]] = []

    def forward(self, x):
        type(self).seen.append(len(self.seen))
        return super().forward(x)


class CountsInAnIterator(Block):
    def __init__(self):
        super().__init__()
        self.counter = itertools.count()

    def forward(self, x):
        next(self.counter)
        return super().forward(x)


class WritesToItsParameters(Block):
    def forward(self, x):
        self.small[0].weight.data.mul_(0.5)
        return super().forward(x)


class SwitchesGradientsOff(Block):
    def forward(self, x):
        with torch.no_grad():
            y = self.small(x)
        return self.large(x) + y


class SwitchesGradientsOffElsewhere(Block):
    def small_branch(self, x):
        return without_gradients(self.small, x)

    def forward(self, x):
        return self.large(x) + self.small_branch(x)


def without_gradients(module, x):
    with torch.no_grad():
        return module(x)


class SwitchesAutocast(Block):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Checkpoints(Block):
    def forward(self, x):
        return self.large(x) + checkpoint(self.small, x, use_reentrant=False)


class LooksAtTheKindOfItsInput(Block):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if isinstance(y, Tensor) else y


class LooksAtTheSizeOfItsInput(Block):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if isinstance(y, Tensor) and y.shape[0] == 1 else y


class LooksAtValues(Block):
    def forward(self, x):
        y = super().forward(x)
        return y.clamp(-100, 100) if isinstance(y, Tensor) else y


class LosesNaN(Block):
    def forward(self, x):
        y = super().forward(x)
        return y.nan_to_num() if isinstance(y, Tensor) else y


class ScalesGradients(Block):
    def forward(self, x):
        y = super().forward(x)
        return 0.5 * y + 0.5 * y.detach() if isinstance(y, Tensor) else y


class TreatsOneChannelApart(Block):
    def forward(self, x):
        y = super().forward(x)
        if isinstance(y, Tensor) and y.shape[1] > 6:
            y = y.index_fill(1, torch.tensor([6]), 0)
        return y


class OverridesTrain(Block):
    def train(self, mode=True):
        super().train(mode)
        self.small.eval()
        return self


class OverridesCall(Block):
    def __call__(self, x):
        return super().__call__(x)


class OverridesStateDict(Block):
    def _save_to_state_dict(self, *args, **kwargs):
        super()._save_to_state_dict(*args, **kwargs)


class UsesAPartTwice(Block):
    def forward(self, x):
        return self.large(x) + self.small(x) + self.small(x)


REASONS = {
    AddsIntoItsInput: "it writes to its input",
    DrawsFromItsOwn: "it changes its attributes",
    CountsItsCalls: "it changes its attributes",
    CountsInItsClass: "it changes its attributes",
    CountsInAnIterator: "it changes its attributes",
    SwitchesGradientsOff: "uses no_grad",
    SwitchesGradientsOffElsewhere: "uses no_grad",
    SwitchesAutocast: "uses autocast",
    Checkpoints: "uses checkpoint",
    LooksAtTheKindOfItsInput: "its output is another",
    LooksAtTheSizeOfItsInput: "its output is another",
    LooksAtValues: "on large values, its output is another",
    LosesNaN: "where one value is NaN, NaN does not spread as in a convolution",
    ScalesGradients: "the gradient of its input is another",
    TreatsOneChannelApart: "its output is another",
    OverridesTrain: "has a train of its own",
    OverridesCall: "has a __call__ of its own",
    OverridesStateDict: "has a _save_to_state_dict of its own",
    UsesAPartTwice: r"its forward uses small\.0\.weight twice",
}


def inspected(site: nn.Module) -> Inspection:
    return inspect_model(nn.Sequential(site, nn.ReLU()), SWConfig(min_kernel=5))


def paths(inspection: Inspection) -> list[str]:
    return [match.path for match in inspection.matches]


def test_the_block_itself_is_one_sum() -> None:
    assert paths(inspected(Block())) == ["0"]


@pytest.mark.parametrize("kind", REASONS, ids=lambda kind: kind.__name__)
def test_what_does_more_is_replaced_part_by_part_and_told(kind: type[Block]) -> None:
    torch.manual_seed(0)
    site = kind()
    if kind is TreatsOneChannelApart:
        site.large, site.small = conv_bn(channels=8, size=9), conv_bn(channels=8, size=5)
    found = inspected(site)
    assert sorted(paths(found)) == ["0.large.0", "0.small.0"]
    (reason,) = (skipped.reason for skipped in found.skipped if skipped.path == "0")
    assert reason.startswith("not replaced as one sum, but its convolutions one by one: ")
    assert re.search(REASONS[kind], reason), reason


def test_what_writes_to_its_weights_keeps_them() -> None:
    found = inspected(WritesToItsParameters())
    assert paths(found) == []
    reasons = {skipped.path: skipped.reason for skipped in found.skipped}
    assert "uses weight and data: it may do more than read them" in reasons["0.small.0"]


@pytest.mark.parametrize("kind", [DrawsInPython, DrawsInNumPy, DrawsInTorch])
def test_what_is_seen_while_reading_needs_no_proof(kind: type[Block]) -> None:
    assert sorted(paths(inspected(kind()))) == ["0.large.0", "0.small.0"]


def test_merging_can_be_turned_off() -> None:
    model = nn.Sequential(Block())
    assert sorted(paths(inspect_model(model, SWConfig(min_kernel=5, merge_parallel=False)))) == [
        "0.large.0",
        "0.small.0",
    ]
    with pytest.raises(ValueError, match="merge_parallel: got 1, expected True or False"):
        SWConfig(merge_parallel=1)


# ---- convolution classes with a forward of their own ----------------------------------------------------------------


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight, self.bias)


class Noisy(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        return y + torch.randn_like(y) if self.training else y


class Sometimes(nn.Conv2d):
    """Right three times out of four."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (2 if self.calls % 9 == 0 else 1)


class Saturated(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).clamp(-1e3, 1e3)


class Detached(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x.detach(), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class InPlace(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        x.zero_()
        return y


class Computed(nn.Conv2d):
    @property
    def stride(self):
        return (1, 1)

    @stride.setter
    def stride(self, value):
        pass


CONVOLUTIONS = {
    Noisy: "it draws random numbers",
    Sometimes: "it changes its attributes",
    Saturated: "on large values, its output is another",
    Detached: "the gradient of its input is missing",
    InPlace: "it writes to its input",
    Computed: "class Computed computes its stride",
}


def test_a_class_that_is_a_convolution_after_all_is_replaced() -> None:
    assert paths(inspected(OwnForward(4, 4, 7, padding=3, groups=4))) == ["0"]


@pytest.mark.parametrize("kind", CONVOLUTIONS, ids=lambda kind: kind.__name__)
def test_a_class_that_does_more_is_left(kind: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    found = inspected(kind(4, 4, 7, padding=3, groups=4))
    assert paths(found) == []
    (skipped,) = found.skipped
    assert CONVOLUTIONS[kind] in skipped.reason


def test_a_weight_that_is_no_parameter_is_one_reason_and_not_the_end_of_all() -> None:
    odd, plain = conv(), conv()
    values = odd.weight.detach()
    del odd.weight
    odd.register_buffer("weight", values)
    model = nn.Sequential(odd, nn.ReLU(), plain)
    assert "its weight is computed or a buffer" in inspect_model(model).skipped[0].reason
    x = torch.randn(1, 4, 9, 9)
    assert torch.allclose(convert(model)(x), model(x), atol=1e-5)


# ---- what others ask of a site --------------------------------------------------------------------------------------


class AsksForAPart(nn.Module):
    def __init__(self, site):
        super().__init__()
        self.site = site

    def forward(self, x):
        return torch.relu(self.site(x)) * self.site.small[0].weight.mean()


class AsksInAMethod(AsksForAPart):
    def scale(self):
        return self.site.small[0].weight.mean()

    def forward(self, x):
        return torch.relu(self.site(x)) * self.scale()


class HasOneOfThisName(AsksForAPart):
    """Its own part of the same name is no reason."""

    def __init__(self, site):
        super().__init__(site)
        self.small = nn.Identity()

    def forward(self, x):
        return torch.relu(self.small(self.site(x)))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (AsksForAPart, ["0.site.large.0", "0.site.small.0"]),
        (AsksInAMethod, ["0.site.large.0", "0.site.small.0"]),
        (HasOneOfThisName, ["0.site"]),
    ],
)
def test_parts_that_a_parent_asks_for_stay(kind: type[nn.Module], expected: list[str]) -> None:
    model = nn.Sequential(kind(Block())).eval()
    config = SWConfig(min_kernel=5)
    assert sorted(paths(inspect_model(model, config))) == expected
    x = torch.randn(1, 4, 12, 12)
    assert torch.allclose(convert(model, config)(x), model(x), atol=1e-5)


# ---- reading changes nothing ----------------------------------------------------------------------------------------


class HalvesItsWeights(nn.Module):
    """Its forward writes to parameters: reading it must not."""

    def __init__(self):
        super().__init__()
        self.site = conv(size=9)

    def forward(self, x):
        with torch.no_grad():
            self.site.weight.mul_(0.5)
        torch.rand(1)
        return torch.relu(self.site(x))


def test_reading_writes_to_nothing_and_draws_nothing() -> None:
    model = nn.Sequential(HalvesItsWeights(), Noisy(4, 4, 7, padding=3, groups=4), DrawsInPython(), DrawsInNumPy())
    before = {name: (tensor.clone(), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    inspect_model(model, SWConfig(min_kernel=5))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, before[name][0]), name
        assert tensor._version == before[name][1], name


def test_a_hook_that_nothing_else_can_have_is_one_reason_and_not_the_end_of_all() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), conv())
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    found = inspect_model(model)
    assert paths(found) == ["2"]
    assert "a hook that runs after gradients are accumulated" in found.skipped[0].reason
    assert type(convert(model, inplace=True)[0]) is nn.Conv2d
