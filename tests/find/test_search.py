"""What the search finds, what it merges, and every reason for which it leaves a layer."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

from sw_transplant import SWConfig, inspect_model
from tests.small_models import Functional, Parallel, Residual, SelfPadding, conv, conv_bn


def found(model, **kwargs):
    return {match.path: match for match in inspect_model(model, **kwargs).matches}


def reasons(model, **kwargs):
    return {skipped.path: skipped.reason for skipped in inspect_model(model, **kwargs).skipped}


# ---- what is found ----


def test_a_single_convolution_is_a_match_with_its_geometry():
    model = nn.Sequential(nn.Conv2d(4, 8, (9, 7), stride=(2, 1), padding=(4, 3), dilation=(1, 2), groups=4))
    (match,) = inspect_model(model).matches
    assert (match.path, match.in_channels, match.out_channels, match.stride) == ("0", 4, 8, (2, 1))
    (branch,) = match.branches
    assert (branch.weight, branch.bias, branch.bn, branch.tile) == ("weight", "bias", None, 5)
    assert branch.geometry.kernel_size == (9, 7)
    assert branch.geometry.padding == (4, 4, 3, 3)
    assert branch.geometry.dilation == (1, 2)
    assert match.parameters_before == 8 * 63 + 8
    assert match.parameters_after == 8 * 4 * 25 + 8


def test_the_model_itself_may_be_the_convolution():
    (match,) = inspect_model(conv()).matches
    assert match.path == ""


@pytest.mark.parametrize(("padding", "expected"), [("valid", (0, 0, 0, 0)), ("same", (3, 4, 2, 3)), (1, (1, 1, 1, 1))])
def test_padding_arguments(padding, expected):
    model = nn.Sequential(nn.Conv2d(4, 4, (8, 6), padding=padding, groups=4))
    (match,) = inspect_model(model).matches
    assert match.branches[0].geometry.padding == expected


def test_subclasses_with_the_forward_of_conv2d_are_accepted():
    class Named(nn.Conv2d):
        def __init__(self, channels):
            super().__init__(channels, channels, 7, padding=3, groups=channels)

    assert list(found(nn.Sequential(Named(4)))) == ["0"]


def test_min_kernel():
    model = nn.Sequential(conv(size=5), conv(size=7), conv(size=3))
    assert list(found(model)) == ["1"]
    assert list(found(model, config=SWConfig(min_kernel=5))) == ["0", "1"]
    assert "smaller than min_kernel = 7" in reasons(model)["0"]


def test_an_object_in_several_places_is_one_match_with_aliases():
    shared = conv()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": shared})
    (match,) = inspect_model(model).matches
    assert (match.path == "a" and match.aliases == ("c", "b.0")) or set(match.aliases) == {"c", "b.0"}


# ---- sums of parallel branches ----


def test_a_sum_of_branches_is_one_match():
    model = nn.Sequential(Residual(Parallel(conv_bn(size=13), conv_bn(size=5), nn.BatchNorm2d(4), nn.Identity())))
    (match,) = inspect_model(model).matches
    assert match.path == "0.inner"
    assert [(b.weight, b.bn) for b in match.branches] == [
        ("parts.0.0.weight", "parts.0.1"),
        ("parts.1.0.weight", "parts.1.1"),
        (None, "parts.2"),
        (None, None),
    ]
    assert reasons(model) == {}  # the 5x5 is part of the match and not a skipped layer


def test_sums_within_sums_are_taken_at_the_top():
    model = Residual(Parallel(Parallel(conv_bn(size=9), conv_bn(size=3)), conv_bn(size=5)))
    (match,) = inspect_model(model).matches
    assert match.path == "inner"
    assert len(match.branches) == 3


def test_a_convolution_with_its_batch_norm_alone_stays_a_leaf():
    assert list(found(Residual(conv_bn()))) == ["inner.0"]


def test_dilated_branches():
    model = Parallel(conv_bn(size=13), conv_bn(size=3, padding=4, dilation=4))
    (match,) = inspect_model(model).matches
    assert match.path == ""
    assert match.branches[1].geometry.dilation == (4, 4)


class TrainEvalDiffer(Parallel):
    def forward(self, x):
        return self.parts[0](x) if self.training else super().forward(x)


class TwoInputs(Parallel):
    def forward(self, x, y=None):
        return super().forward(x)


class Scaled(Parallel):
    def forward(self, x):
        return 2 * super().forward(x)


class ValueDependent(Parallel):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class Twice(Parallel):
    def forward(self, x):
        return self.parts[1](self.parts[0](x)) + x


class Unused(Parallel):
    def __init__(self, *branches):
        super().__init__(*branches)
        self.gain = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("kind", [TrainEvalDiffer, TwoInputs, Scaled, ValueDependent, Twice, Unused])
def test_modules_that_are_more_than_a_sum_keep_their_forward(kind):
    model = nn.Sequential(kind(conv_bn(size=9), conv_bn(size=7)))
    assert list(found(model)) == ["0.parts.0.0", "0.parts.1.0"]


def broken_block(change):
    block = Parallel(conv_bn(size=9), conv_bn(size=7))
    change(block)
    return nn.ModuleDict({"block": block, "other": nn.Identity()})


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.register_forward_hook(lambda *a: None),
        lambda block: block.parts[1][1].register_forward_hook(lambda *a: None),
        lambda block: setattr(block, "forward", lambda x: block.parts[0](x)),
        lambda block: parametrize.register_parametrization(block.parts[1][1], "weight", nn.Identity()),
        lambda block: block.parts[1].to(torch.float64),
        lambda block: setattr(block.parts[1][0], "stride", (2, 2)),
    ],
    ids=["hook", "hook inside", "instance forward", "parametrization inside", "dtypes", "strides"],
)
def test_blocks_with_something_else_attached_are_not_merged(change):
    model = broken_block(change)
    assert list(found(model)) == ["block.parts.0.0", "block.parts.1.0"]


def test_a_block_whose_part_is_used_elsewhere_is_not_merged():
    model = broken_block(lambda block: None)
    model["other"] = model["block"].parts[1]
    assert list(found(model)) == ["block.parts.0.0", "block.parts.1.0"]


# ---- functional convolutions ----


def test_a_functional_convolution_that_is_the_whole_forward_is_found():
    (match,) = inspect_model(nn.Sequential(Functional())).matches
    assert match.path == "0"
    assert match.branches[0].weight == "kernel"
    assert match.branches[0].bias == "offset"
    assert match.branches[0].geometry.padding == (4, 4, 4, 4)


def test_a_functional_convolution_inside_a_larger_forward_is_reported():
    assert "but its forward calls" in reasons(nn.Sequential(Functional(nn.ReLU())))["0"]


def test_a_weight_that_is_computed_is_reported():
    class Standardised(Functional):
        def forward(self, x):
            return F.conv2d(x, self.kernel - self.kernel.mean(), self.offset, **self.settings)

    assert "depthwise kernel, but" in reasons(nn.Sequential(Standardised()))["0"]


# ---- reasons to leave a layer ----


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class NoisyInTraining(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


class CondConv(nn.Module):
    """Looks like a convolution and is another class."""

    def __init__(self):
        super().__init__()
        self.in_channels = self.out_channels = self.groups = 4
        self.kernel_size = (7, 7)
        self.weight = nn.Parameter(torch.zeros(2, 4 * 49))


def hooked(register):
    layer = conv()
    getattr(layer, register)(lambda *args: None)
    return layer


def changed(change):
    layer = conv()
    change(layer)
    return layer


def scripted():
    return torch.jit.script(nn.Sequential(conv()))


REASONS = {
    "forward hook": (lambda: hooked("register_forward_hook"), "forward hooks"),
    "forward pre-hook": (lambda: hooked("register_forward_pre_hook"), "forward pre-hooks"),
    "backward hook": (lambda: hooked("register_full_backward_hook"), "backward hooks"),
    "backward pre-hook": (lambda: hooked("register_full_backward_pre_hook"), "backward pre-hooks"),
    "pruning": (lambda: changed(lambda m: prune.l1_unstructured(m, "weight", 0.5)), "pruning"),
    "parametrization": (
        lambda: changed(lambda m: nn.utils.parametrizations.weight_norm(m)),
        "remove_parametrizations",
    ),
    "instance forward": (lambda: changed(lambda m: setattr(m, "forward", lambda x: x)), "replaced on the instance"),
    "scripted": (scripted, "TorchScript"),
    "lazy": (lambda: nn.LazyConv2d(4, 7, groups=4), "lazy"),
    "padding_mode": (lambda: conv(padding_mode="reflect"), "padding_mode 'reflect' is not supported (zeros is)"),
    "1-D": (lambda: nn.Conv1d(4, 4, 7, groups=4), "1-dimensional"),
    "3-D": (lambda: nn.Conv3d(4, 4, 7, groups=4), "3-dimensional"),
    "groups": (lambda: conv(groups=2), "groups 2 != in_channels 4"),
    "one channel": (lambda: nn.Conv2d(1, 4, 7), "single input channel"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 7, groups=4), "transposed"),
    "own forward": (lambda: OwnForward(4, 4, 7, padding=3, groups=4), "OwnForward has a forward of its own"),
    "own conv forward": (lambda: OwnConvForward(4, 4, 7, groups=4), "forward of its own"),
    "train differs": (lambda: NoisyInTraining(4, 4, 7, groups=4), "forward of its own"),
    "another class": (CondConv, "CondConv is not an nn.Conv2d"),
    "complex weights": (lambda: conv(dtype=torch.complex64), "torch.complex64"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("case", REASONS)
def test_reason_to_leave_a_layer(case):
    build, expected = REASONS[case]
    model = nn.ModuleDict({"left": build(), "taken": conv()})
    inspection = inspect_model(model)
    assert [match.path for match in inspection.matches] == ["taken"]
    (skipped,) = inspection.skipped
    assert skipped.path == "left"
    assert expected in skipped.reason
    assert re.sub(r"\s", "", skipped.reason[:20]) in re.sub(r"\s", "", str(inspection))


def test_tied_weights_are_left():
    model = nn.ModuleDict({"a": conv(), "b": conv()})
    model["b"].weight = model["a"].weight
    assert found(model) == {}
    assert all("a.weight and b.weight are one parameter" in reason for reason in reasons(model).values())


@pytest.mark.parametrize("stride", [1, 2])
def test_a_class_that_pads_by_itself_is_recognised_by_running_it(stride):
    (match,) = inspect_model(nn.Sequential(SelfPadding(4, 4, 7, stride, groups=4))).matches
    assert match.branches[0].geometry.padding == "same"


def test_a_probed_layer_keeps_its_state_and_the_random_stream():
    layer = OwnForward(4, 4, 7, groups=4)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state = torch.get_rng_state()
    inspect_model(nn.Sequential(layer))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_layers_on_the_meta_device_are_found():
    with torch.device("meta"):
        model = nn.Sequential(conv(), Residual(Parallel(conv_bn(size=13), conv_bn(size=5))))
    assert list(found(model)) == ["0", "1.inner.parts.0.0"]
    assert "meta device" in reasons(model)["1.inner"]


# ---- select ----


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("stages.0", ["stages.0.0"]),
        (["stages.*.1"], ["stages.1.1"]),
        (["stem", "stages.1"], ["stem", "stages.1.0", "stages.1.1"]),
        (lambda path, module: module.in_channels == 8, ["stages.1.0", "stages.1.1"]),
    ],
)
def test_select(select, expected):
    stages = nn.Sequential(nn.Sequential(conv()), nn.Sequential(conv(8), conv(8)))
    model = nn.ModuleDict({"stem": conv(), "stages": stages})
    assert list(found(model, select=select)) == expected
    assert set(reasons(model, select=select).values()) == {"left out by select"}


def test_select_of_a_part_of_a_sum_converts_only_that_part():
    model = Residual(Parallel(conv_bn(size=9), conv_bn(size=7)))
    assert list(found(model, select="inner.parts.1")) == ["inner.parts.1.0"]


def test_a_pattern_that_names_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"pattern 'stage\.0' names no layer"):
        inspect_model(nn.Sequential(conv()), select=["stage.0"])


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"got str, expected an nn.Module"):
        inspect_model("convnext")
    with pytest.raises(ValueError, match=r"entry 3"):
        inspect_model(conv(), select=[3])


# ---- the search leaves no trace ----


def test_a_failed_trace_leaves_nothing_behind():
    class Caching(Parallel):
        def forward(self, x):
            self.cached = x * 2  # a Proxy, while it is traced
            if self.cached.sum() > 0:
                return x
            return super().forward(x)

    block = Caching(conv_bn(size=9), conv_bn(size=7))
    model = nn.Sequential(block)
    inspect_model(model)
    assert not hasattr(block, "cached")


def test_printed_inspection_names_layers_kernels_and_reasons():
    model = nn.ModuleDict({"block": Parallel(conv_bn(size=13), conv_bn(size=5)), "small": conv(size=3)})
    text = str(inspect_model(model))
    assert "block" in text
    assert "13x13 + 5x5" in text
    assert "min_kernel = 7" in text
    assert "No large depthwise convolution" in str(inspect_model(nn.Sequential(nn.ReLU())))
