"""The surgery on small models: what is exchanged, what stays, and that a failure changes nothing."""

import copy
import sys

import pytest
import torch
from torch import nn

from sw_transplant import NoLargeKernelError, ShiftwiseConv2d, SWConfig, convert, load, save, summary
from tests.small_models import Parallel, conv, conv_bn, model_of_everything
from tests.snapshots import assert_unchanged, snapshot

surgery = sys.modules["sw_transplant.surgery.convert"]  # the package's attribute of that name is the function


def shiftwise(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, ShiftwiseConv2d)}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", ["shift", "assembled"])
def test_the_function_is_preserved(form, training):
    model = model_of_everything().train(training)
    converted = convert(model, SWConfig(form=form))
    assert list(shiftwise(converted)) == ["0.inner", "1.inner", "2.inner", "5", "6", "7"]
    x = torch.randn(2, 4, 21, 18, dtype=torch.float64)
    y, expected = converted(x), copy.deepcopy(model)(x)
    assert (y - expected).norm() <= 1e-12 * expected.norm()


def test_a_copy_is_converted_and_the_model_left_as_it_was():
    model = model_of_everything()
    before = snapshot(model)
    converted = convert(model)
    assert converted is not model
    assert type(converted) is type(model)
    assert_unchanged(model, before)


def test_in_place_the_model_itself_is_converted_and_other_layers_stay_the_same_objects():
    model = model_of_everything()
    kept, bns = (
        [model[0], model[3], model[4]],
        [part for part in model[1].inner.modules() if isinstance(part, nn.BatchNorm2d)],
    )
    assert convert(model, inplace=True) is model
    assert [model[0], model[3], model[4]] == kept
    assert [branch.bn for branch in model[1].inner.branches] == bns  # each branch keeps its own BatchNorm


def test_every_place_of_a_shared_layer_is_rewritten():
    converted = convert(model_of_everything())
    assert isinstance(converted[2].inner, ShiftwiseConv2d)
    assert converted[2].inner is converted[4].inner[0]


def test_a_model_that_is_a_convolution_is_replaced_by_its_module():
    layer = conv()
    converted = convert(layer)
    x = torch.randn(1, 4, 9, 9)
    assert isinstance(converted, ShiftwiseConv2d)
    torch.testing.assert_close(converted(x), layer(x))


def test_requires_grad_and_modes_are_kept():
    model = nn.Sequential(conv(), Parallel(conv_bn(), conv_bn(size=5)), conv(bias=False))
    model[0].weight.requires_grad_(False)
    model[1].parts[0][1].eval()
    model[1].parts[1][0].requires_grad_(False)
    model[2].eval()
    converted = convert(model)
    first, block, last = converted
    assert not first.branches[0].bank.requires_grad
    assert first.branches[0].bias.requires_grad
    assert [branch.bank.requires_grad for branch in block.branches] == [True, False]
    assert [branch.bn.training for branch in block.branches] == [False, True]
    assert [first.training, block.training, last.training] == [True, True, False]
    assert not any(module.training for module in last.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    converted = convert(nn.Sequential(conv(), Parallel(conv_bn(), conv_bn(size=5))).to(dtype))
    assert {p.dtype for p in converted.parameters()} == {dtype}


def test_meta_device_is_kept():
    with torch.device("meta"):
        model = nn.Sequential(conv(), Parallel(conv_bn(), conv_bn(size=5)))
    assert all(parameter.is_meta for parameter in convert(model).parameters())


def test_converting_twice_changes_nothing():
    once = convert(model_of_everything())
    before = snapshot(once)
    assert convert(once, inplace=True) is once
    assert_unchanged(once, before)


def test_a_partly_converted_model_is_converted_to_the_end():
    model = nn.Sequential(conv(), conv())
    half = convert(model, select="0")
    whole = convert(half)
    assert list(shiftwise(half)) == ["0"]
    assert list(shiftwise(whole)) == ["0", "1"]


def test_nothing_to_convert_is_an_error_with_the_reasons():
    with pytest.raises(NoLargeKernelError, match=r"kernel of 7 or more taps"):
        convert(nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(NoLargeKernelError, match=r"padding_mode 'reflect'"):
        convert(nn.Sequential(conv(padding_mode="reflect")))
    with pytest.raises(NoLargeKernelError, match=r"min_kernel = 7"):
        convert(nn.Sequential(conv(size=5)))


def test_a_wrapped_model_is_refused():
    for wrapped in (torch.compile(nn.Sequential(conv())), nn.Sequential(torch.compile(conv()))):
        with pytest.raises(ValueError, match=r"wrapped by torch.compile.*convert first, then wrap"):
            convert(wrapped)


def test_a_model_that_cannot_be_copied_is_named_with_the_way_out():
    model = nn.Sequential(conv())
    model.lock = __import__("threading").Lock()
    with pytest.raises(ValueError, match=r"cannot be copied .*inplace=True"):
        convert(model)
    assert shiftwise(convert(model, inplace=True))
    locked = nn.Sequential(conv())
    locked.lock = model.lock
    with pytest.raises(
        ValueError, match=r"converts a copy, in place, too, .* cannot be copied .*; expected a model that"
    ):
        convert(locked, SWConfig(mode="shiftwise"), calibration=torch.randn(2, 4, 9, 9), inplace=True)


class TestFailure:
    """A conversion that fails half-way leaves the model as it was."""

    def test_while_modules_are_built(self, monkeypatch):
        model, real, calls = model_of_everything(), surgery.build, []

        def failing(*args, **kwargs):
            calls.append(args)
            if len(calls) == 3:
                raise RuntimeError("out of memory")
            return real(*args, **kwargs)

        monkeypatch.setattr(surgery, "build", failing)
        before = snapshot(model)
        with pytest.raises(RuntimeError, match=r"out of memory"):
            convert(model, inplace=True)
        assert_unchanged(model, before)

    def test_while_modules_are_exchanged(self, monkeypatch):
        model, real, calls = model_of_everything(), surgery.find_site, []
        inspected = convert(model)  # the number of matches is known from here

        def failing(*args):
            calls.append(args)
            if len(calls) == len(shiftwise(inspected)) + 7:  # all are built, three are in their places
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(surgery, "find_site", failing)
        before = snapshot(model)
        with pytest.raises(KeyboardInterrupt):
            convert(model, inplace=True)
        assert_unchanged(model, before)

    def test_while_a_match_does_not_fit(self):
        (match,) = surgery.inspect_model(nn.Sequential(conv())).matches
        for other, message in [
            (nn.Sequential(conv(size=9)), r"shape \(4, 1, 9, 9\), expected \(4, 1, 7, 7\)"),
            (nn.Sequential(nn.ReLU()), "no parameter 'weight'"),
        ]:
            with pytest.raises(ValueError, match=message):
                surgery.build(other[0], match, form="auto")


def test_summary_shows_converted_layers_and_what_runs():
    text = summary(convert(nn.Sequential(conv(), Parallel(conv_bn(size=13), conv_bn(size=5))), SWConfig(form="shift")))
    assert "13x13 + 5x5" in text
    assert "9 of 5x5 + 1 of 5x5" in text
    assert "shift" in text
    assert "No large depthwise" not in text
    assert "7x7" in summary(nn.Sequential(conv()))


@pytest.mark.parametrize("form", ["shift", "assembled"])
@pytest.mark.parametrize("tile", [3, 5])
def test_edges_at_gain_zero_keep_the_function_and_can_learn(form, tile, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Parallel(conv_bn(size=13), conv_bn(size=5)), nn.ReLU(), conv(size=9)).double()
    converted = convert(model, SWConfig(form=form, tile=tile, edges=3))
    (match, _) = surgery.inspect_model(model, SWConfig(tile=tile, edges=3)).matches
    assert match.parameters_after == sum(p.numel() for p in converted[0].parameters())
    x = torch.randn(2, 4, 12, 11, dtype=torch.float64)
    for mode in (True, False):
        model.train(mode)
        converted.train(mode)
        y, expected = converted(x), model(x)
        assert (y - expected).norm() <= 1e-12 * expected.norm()
    y.square().sum().backward()
    gain = converted[2].branches[0].gain
    assert gain.tolist() == [1, 0, 0]
    assert (gain.grad != 0).all()
    with torch.no_grad():
        gain += 0.5
    save(converted, tmp_path)
    assert torch.equal(load(model, tmp_path)(x), converted(x))
