"""What belongs to a model beside its function, and is there after a conversion: hooks, attributes, flags, padding."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sw_transplant import NoLargeKernelError, SWConfig, convert, load, merge, save
from sw_transplant.find.parameters import reason_against_parameters
from tests.find.test_search import SelfPadding, conv
from tests.runtime_models import Strips, images

both_ways = pytest.mark.parametrize("inplace", [False, True])


def conv_in_block(**options: object) -> nn.Module:
    """A convolution, and layers around it that are not converted."""
    torch.manual_seed(0)
    settings = {"padding": 3, "groups": 4, **options}
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 7, **settings), nn.BatchNorm2d(4), nn.ReLU())


def masked(grad: Tensor) -> Tensor:
    """Depends on the shape of the kernel."""
    grad = grad.clone()
    grad[..., 0] = 0
    return grad / grad.square().sum((1, 2, 3), keepdim=True).sqrt()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of the parameters, a converted layer's in the shape of the original's."""
    model.zero_grad()
    model(x).square().mean().backward()
    layer = model[1]
    found = {name: p.grad for name, p in model.named_parameters() if not name.startswith("1.")}
    return {**found, "weight": layer.weight.grad, "bias": layer.bias.grad}


def assert_same_gradients(model: nn.Module, original: nn.Module) -> None:
    x = images(2, 4)
    expected, got = gradients(original, x), gradients(model, x)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# ---- hooks ----------------------------------------------------------------------------------------------------------


@both_ways
def test_tensor_hooks_see_gradients_of_the_kernel(inplace: bool) -> None:
    seen = []

    def build() -> nn.Module:
        model = conv_in_block()
        model[1].weight.register_hook(lambda grad: seen.append(grad.shape))
        model[1].weight.register_hook(masked)
        model[1].bias.register_hook(lambda grad: 3 * grad)
        model[2].weight.register_hook(lambda grad: 5 * grad)
        return model

    assert_same_gradients(convert(build(), inplace=inplace), build())
    assert seen == [(4, 1, 7, 7)] * 2


def test_hooks_stay_alive_where_the_model_itself_is_converted() -> None:
    model, twin = conv_in_block(), conv_in_block()
    weight, others = model[1].weight, twin[1].weight
    handles = [one.register_hook(lambda grad: 2 * grad) for one in (weight, others)]
    converted = convert(model, inplace=True)
    assert_same_gradients(converted, twin)
    for one in (weight, others):
        one.register_hook(masked)
    assert_same_gradients(converted, twin)
    for handle in handles:
        handle.remove()
    assert_same_gradients(converted, twin)


def test_a_frozen_weight_keeps_its_hooks() -> None:
    def build() -> nn.Module:
        model = conv_in_block()
        model[1].weight.register_hook(masked)
        model[1].weight.requires_grad_(False)
        return model

    converted, plain = convert(build()), build()
    for model in (converted, plain):
        assert not model[1].weight.requires_grad
        model[1].weight.requires_grad_(True)
    assert_same_gradients(converted, plain)


def test_a_hook_that_writes_into_the_gradient() -> None:
    def build() -> nn.Module:
        model = conv_in_block()
        model[1].weight.register_hook(halve)
        return model

    def halve(grad: Tensor) -> None:
        grad.mul_(0.5)

    assert_same_gradients(convert(build()), build())


@both_ways
def test_hooks_after_accumulation_are_refused_on_a_kernel_and_kept_elsewhere(inplace: bool) -> None:
    model = conv_in_block()
    model[1].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(NoLargeKernelError, match=r"its weight has a hook that runs after gradients are accumulated"):
        convert(model, inplace=inplace)
    assert type(model[1]) is nn.Conv2d

    model, called = conv_in_block(), []
    model[0].weight.register_post_accumulate_grad_hook(called.append)
    converted = convert(model, inplace=inplace)
    converted(images(2, 4)).sum().backward()
    assert [id(one) for one in called] == [id(converted[0].weight)]


def test_hooks_on_a_kernel_that_will_be_no_kernel_are_refused() -> None:
    for config, why in ((SWConfig(edges=2), "with edges=2"), (SWConfig(mode="shiftwise"), "in mode 'shiftwise'")):
        model = conv_in_block()
        model[1].weight.register_hook(masked)
        with pytest.raises(NoLargeKernelError, match=f"its weight has tensor hooks.*{why}"):
            convert(model, config)
    model = conv_in_block()
    model[1].bias.register_hook(lambda grad: 3 * grad)
    assert convert(model, SWConfig(edges=2))[1].bias is not None


def test_modules_are_not_fitted_to_kernels_without_values() -> None:
    with torch.device("meta"):
        model = conv_in_block()
    assert next(convert(model)[1].parameters()).is_meta
    for calibration in (None, images(2, 4)):
        with pytest.raises(NoLargeKernelError, match=r"its weight is on the meta device .* load the weights first"):
            convert(model, SWConfig(mode="shiftwise"), calibration=calibration)


def test_the_reason_in_words() -> None:
    plain = conv()
    assert reason_against_parameters({"weight": plain.weight, "bias": None}) is None
    assert "its weight is no Parameter" in str(reason_against_parameters({"weight": plain.weight * 2}))
    assert "its bias is no Parameter" in str(reason_against_parameters({"weight": plain.weight, "bias": torch.ones(4)}))


# ---- attributes, gradients, requires_grad ---------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("config", [SWConfig(), SWConfig(edges=3)], ids=["laid out", "edges"])
def test_attributes_of_parameters(inplace: bool, config: SWConfig) -> None:
    model = conv_in_block()
    shared = {"a": [1]}
    model[0].weight._optim = shared
    model[1].weight._no_weight_decay, model[1].weight._optim = True, shared
    model[1].bias.rate = 0.5
    converted = convert(model, config, inplace=inplace)
    (branch,) = converted[1].branches
    assert branch.bank._no_weight_decay
    assert branch.bias.rate == 0.5
    assert converted[0].weight._optim is branch.bank._optim  # one object before, one afterwards
    assert branch.bank._optim == shared
    merged = merge(converted)
    assert merged[1].weight._no_weight_decay
    assert merged[1].bias.rate == 0.5
    assert merged[0].weight._optim == shared


def test_attributes_in_sums_and_in_the_papers_module() -> None:
    model = nn.Sequential(Strips(), nn.ReLU())
    for part in model[0].convs:
        part.weight._no_weight_decay = True
    model[0].convs[0].weight.only_here = 1
    (layer, _) = convert(model)
    assert [vars(branch.bank) for branch in layer.branches] == [
        {"_no_weight_decay": True, "only_here": 1},
        {"_no_weight_decay": True},
        {"_no_weight_decay": True},
    ]
    shared = convert(model, SWConfig(mode="shiftwise"))[0]
    assert [vars(path.weight) for path in shared.paths] == [{"_no_weight_decay": True}] * 2
    assert all(vars(part.weight) == {"_no_weight_decay": True} for part in merge(convert(model).eval())[0])


def test_a_gradient_that_is_there_stays_where_the_model_itself_is_converted() -> None:
    model = conv_in_block()
    model(images(2, 4)).sum().backward()
    expected = model[1].weight.grad.clone(), model[1].bias.grad.clone()
    layer = convert(model, inplace=True)[1]
    assert torch.equal(layer.weight.grad, expected[0])
    assert torch.equal(layer.bias.grad, expected[1])


@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias")])
def test_requires_grad_of_weight_and_bias_goes_through_everything(frozen: tuple[str, ...]) -> None:
    model = conv_in_block()
    for name in frozen:
        getattr(model[1], name).requires_grad_(False)
    converted = convert(model)
    folded = copy.deepcopy(converted)
    folded[1].reparameterize()
    for one in (converted, folded, merge(converted), merge(folded)):
        assert one[1].weight.requires_grad is ("weight" not in frozen)
        assert one[1].bias.requires_grad is ("bias" not in frozen)


def test_requires_grad_of_strips_and_batch_norms() -> None:
    model = nn.Sequential(Strips(norm=False)).eval()
    model.requires_grad_(False)
    model[0].convs[1].weight.requires_grad_(True)
    merged = merge(convert(model))[0]
    assert [(part.kernel_size, part.weight.requires_grad) for part in merged] == [((13, 5), False), ((5, 13), True)]
    folded = convert(model)
    folded[0].reparameterize()
    assert [branch.bank.requires_grad for branch in folded[0].branches] == [False, True]

    model = nn.Sequential(Strips()).requires_grad_(False).eval()
    model[0].norms[0].bias.requires_grad_(True)
    first, second = merge(convert(model))[0]
    assert [first.weight.requires_grad, second.weight.requires_grad, first.bias.requires_grad] == [False, False, True]


# ---- flags ----------------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("mode", ["laid_out", "shiftwise"])
def test_flags_on_the_layer(inplace: bool, mode: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = conv_in_block()
        model[1].loud, model[1].name, model[1]._mine = 3, "conv", (1, 2)
        model[1].others = [model[0]]  # would keep alive what is no longer there
        model[1].form = "mine"  # a name that the layer needs itself
        return model

    converted = convert(build(), SWConfig(mode=mode), inplace=inplace)
    layer = converted[1]
    assert (layer.loud, layer.name, layer._mine) == (3, "conv", (1, 2))
    assert not hasattr(layer, "others")
    assert layer.form == "auto"
    layer.loud = 4
    if mode == "laid_out":
        assert (merge(converted)[1].loud, merge(converted)[1].name) == (4, "conv")
    save(converted, tmp_path)
    assert load(build(), tmp_path)[1].loud == 3


def test_flags_on_a_sum() -> None:
    model = nn.Sequential(Strips(), nn.ReLU())
    model[0].factor = 2.0
    model[0].weights = [model[0].convs[0].weight]
    layer = convert(model)[0]
    assert layer.factor == 2.0
    assert not hasattr(layer, "weights")


# ---- padding --------------------------------------------------------------------------------------------------------

PADDINGS = [("same", 7), ("same", 8), ("valid", 7), (3, 7), ((3, 2), (7, 5)), ((0, 4), (2, 9)), (2, 8)]


@pytest.mark.parametrize(("padding", "kernel"), PADDINGS)
def test_padding_is_as_it_was_written(padding: object, kernel: object, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, kernel, padding=padding, groups=4))
    converted, x = convert(model), images(2, 4, (15, 16))
    save(converted, tmp_path)
    for one in (converted, merge(converted), load(model, tmp_path), copy.deepcopy(converted)):
        layer = one[1]
        assert layer.padding == model[1].padding
        assert layer.kernel_size == model[1].kernel_size
        by_hand = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        torch.testing.assert_close(by_hand, model[1](x))
        torch.testing.assert_close(layer(x), model[1](x))


def test_padding_of_a_class_that_pads_by_itself() -> None:
    """It states another padding than the one it has; code that reads it got that, too."""
    plain = SelfPadding(4, 4, 7, 2, groups=4)
    layer = convert(plain)
    assert layer.padding == plain.padding
    assert layer.pads_by_map
    x = images(2, 4, (14, 13))
    torch.testing.assert_close(merge(layer)(x), plain(x))


def test_padding_of_what_is_no_single_convolution() -> None:
    assert convert(Strips()).padding == (6, 6)
    assert convert(nn.Conv2d(4, 4, 8, padding="same", groups=4), SWConfig(tile=5, edges=2)).padding == (3, 6, 3, 6)


def test_names_of_the_layer_itself_are_not_taken() -> None:
    model = nn.Sequential(Strips(), nn.ReLU())
    model[0].branches = ("13x5", "5x13")  # the layer has branches of its own
    layer = convert(model)[0]
    assert len(layer.branches) == len(layer.match.branches)
    assert "branches" not in layer.flags
