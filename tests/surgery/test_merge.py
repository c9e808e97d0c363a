"""Back to plain convolutions: same function, original kernel sizes, original bits."""

import pytest
import torch
from torch import nn

from sw_transplant import ShiftwiseConv2d, convert, merge
from sw_transplant.surgery.merge import ParallelConv2d, SameConv2d
from tests.small_models import Parallel, SelfPadding, conv, conv_bn, model_of_everything


def test_the_function_is_preserved_and_no_shiftwise_module_is_left():
    model = model_of_everything().eval()
    converted = convert(model)
    merged = merge(converted)
    assert not any(isinstance(module, ShiftwiseConv2d) for module in merged.modules())
    assert isinstance(converted[0].inner, ShiftwiseConv2d)  # merge works on a copy
    for size in [(21, 18), (20, 33)]:
        x = torch.randn(2, 4, *size, dtype=torch.float64)
        assert (merged(x) - model(x)).norm() <= 1e-12 * model(x).norm()


def test_one_convolution_comes_back_bit_for_bit():
    for layer in (conv(), conv(size=8, padding="same"), nn.Conv2d(4, 8, (9, 5), (2, 1), (4, 2), (1, 2), groups=4)):
        merged = merge(convert(layer)).eval()
        plain = merged if isinstance(merged, nn.Conv2d) else merged[1]
        assert type(plain) is nn.Conv2d
        assert torch.equal(plain.weight, layer.weight)
        assert torch.equal(plain.bias, layer.bias)
        x = torch.randn(1, 4, 19, 22)
        torch.testing.assert_close(merged(x), layer(x))


def test_parallel_strips_stay_two_convolutions():
    block = Parallel(
        nn.Conv2d(4, 4, (51, 5), padding=(25, 2), groups=4),
        nn.Conv2d(4, 4, (5, 51), padding=(2, 25), groups=4),
        conv_bn(size=5),
    ).eval()
    merged = merge(convert(block))
    assert isinstance(merged, ParallelConv2d)
    assert [part.kernel_size for part in merged] == [(51, 5), (5, 51)]
    again = convert(merged)  # what was merged is found again, as one module
    assert isinstance(again, ShiftwiseConv2d)
    assert len(again.branches) == 2


def test_padding_that_depends_on_the_map_is_kept():
    merged = merge(convert(SelfPadding(4, 4, 7, 2, groups=4)))
    assert isinstance(merged, SameConv2d)


def test_modes_and_gradients_are_kept():
    model = nn.Sequential(conv().requires_grad_(False), conv()).eval()
    merged = merge(convert(model))
    assert [p.requires_grad for p in merged.parameters()] == [False, False, True, True]
    assert not any(module.training for module in merged.modules())


def test_shared_layers_stay_shared():
    shared = conv()
    merged = merge(convert(nn.ModuleDict({"a": shared, "b": shared})))
    assert merged["a"] is merged["b"]


def test_in_place():
    model = convert(nn.Sequential(conv()))
    assert merge(model, inplace=True) is model
    assert type(model[0]) is nn.Conv2d


def test_errors():
    with pytest.raises(ValueError, match=r"no Shiftwise module, expected a model from convert"):
        merge(nn.Sequential(conv()))
    model = convert(
        nn.Sequential(Parallel(conv_bn(), nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False))))
    )
    with pytest.raises(NotImplementedError, match=r"no running statistics"):
        merge(model, inplace=True)
    assert isinstance(model[0], ShiftwiseConv2d)


def test_a_merged_model_exports():
    model = merge(convert(nn.Sequential(Parallel(conv_bn(), conv_bn(size=5)), nn.ReLU()).eval()))
    x = torch.randn(2, 4, 12, 12)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


def test_hooks_of_a_layer_stay_with_what_takes_its_place() -> None:
    converted, seen = convert(nn.Sequential(conv(), nn.ReLU())), []
    converted[0].register_forward_hook(lambda module, inputs, output: output * 2)
    converted[0].register_forward_pre_hook(lambda module, inputs: seen.append(type(module).__name__))
    x = torch.randn(1, 4, 9, 9)
    assert torch.allclose(merge(converted)(x), converted(x), atol=1e-5)
    assert sorted(seen) == ["Conv2d", "ShiftwiseConv2d"]
