"""Writing a kernel into a layer: by set_weight, or by assigning a Parameter as to an nn.Conv2d."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sw_transplant import ShiftwiseConv2d, SWConfig, convert, merge, save
from sw_transplant.forms import FORMS
from sw_transplant.layers.branch import Branch
from tests.runtime_models import images, layer

GEOMETRIES: dict[str, Callable[..., nn.Conv2d]] = {
    "square": lambda **kw: nn.Conv2d(4, 4, 7, padding=3, groups=4, **kw),
    "strip, stride, multiplier": lambda **kw: nn.Conv2d(4, 8, (13, 3), 2, (6, 1), groups=4, **kw),
    "even, dilated": lambda **kw: nn.Conv2d(4, 4, 8, padding="same", dilation=2, groups=4, **kw),
}
every_geometry = pytest.mark.parametrize("name", GEOMETRIES)


def pair(name: str, **options: object) -> tuple[nn.Conv2d, ShiftwiseConv2d]:
    """A convolution and what it is converted to."""
    torch.manual_seed(0)
    plain = GEOMETRIES[name](**options)
    converted = convert(plain)
    assert isinstance(converted, ShiftwiseConv2d)
    return plain, converted


def assert_same(plain: nn.Module, converted: nn.Module) -> None:
    x = images(2, 4, (19, 21))
    torch.testing.assert_close(converted(x), plain(x), rtol=1e-4, atol=1e-5)


@every_geometry
@pytest.mark.parametrize("form", FORMS)
def test_set_weight_lays_out_and_reads_back_the_same_bits(name: str, form: str) -> None:
    plain, converted = pair(name)
    converted.form = form
    weight = torch.randn_like(plain.weight)
    banks = [id(parameter) for parameter in converted.parameters()]
    with torch.no_grad():
        converted.eval()(images(2, 4, (19, 21)))  # what is kept must not serve afterwards
        converted.set_weight(weight)
        plain.weight.copy_(weight)
        assert_same(plain, converted)
    assert torch.equal(converted.weight, weight)
    assert [id(parameter) for parameter in converted.parameters()] == banks  # an optimizer goes on with them
    assert converted.weight.requires_grad
    assert torch.equal(merge(converted).weight, weight)


def test_set_weight_casts_and_takes_any_strides() -> None:
    _, converted = pair("square")
    weight = torch.randn(7, 7, 1, 4, dtype=torch.float64).permute(3, 2, 0, 1)
    converted.set_weight(weight)
    assert torch.equal(converted.weight, weight.float())
    half = convert(GEOMETRIES["square"](dtype=torch.bfloat16, device="cpu").to(memory_format=torch.channels_last))
    half.set_weight(weight)
    assert torch.equal(half.weight, weight.bfloat16())
    assert half.branches[0].bank.is_contiguous(memory_format=torch.channels_last)
    meta = convert(GEOMETRIES["square"](device="meta"))
    meta.set_weight(torch.empty(4, 1, 7, 7, device="meta"))


@every_geometry
def test_an_assigned_parameter_is_laid_out(name: str) -> None:
    plain, converted = pair(name)
    converted.weight.sum().backward()
    converted.branches[0].bank.old = True
    for requires_grad in (False, True):
        for module in (plain, converted):
            parameter = nn.Parameter(0.5 * module.weight.detach(), requires_grad=requires_grad)
            parameter.rate = 0.1
            module.weight = parameter
        assert_same(plain, converted)
        assert torch.equal(converted.weight, plain.weight)
        assert converted.weight.requires_grad is requires_grad
        assert vars(converted.branches[0].bank) == {"rate": 0.1}
        assert converted.weight.grad is None
    assert [key for key, _ in converted.named_parameters()] == ["branches.0.bank", "branches.0.bias"]


def test_hooks_of_an_assigned_parameter_replace_those_of_the_one_before() -> None:
    plain, converted = pair("square")
    own = []
    converted.branches[0].bank.register_hook(lambda grad: own.append(grad.shape))
    for factor in (2.0, 3.0):
        for module in (plain, converted):
            parameter = nn.Parameter(module.weight.detach().clone())
            parameter.register_hook(lambda grad, factor=factor: factor * grad)
            parameter.grad = torch.ones_like(parameter)
            module.weight = parameter
        plain.weight.sum().backward()
        converted.weight.sum().backward()
        assert torch.equal(converted.weight.grad, plain.weight.grad)
        assert plain.weight.grad.max() == 1 + factor
    assert own == [converted.branches[0].bank.shape] * 2  # who hooked the bank itself still sees its gradients


def test_the_weight_of_another_layer_is_taken() -> None:
    _, one = pair("square")
    other = convert(GEOMETRIES["square"]())
    one.weight = other.weight
    assert torch.equal(one.weight, other.weight)
    one.weight = one.weight
    other.set_weight(2 * other.weight)
    assert torch.equal(2 * one.weight, other.weight)  # and not shared


def test_fusing_with_a_batch_norm() -> None:
    """PyTorch's own function assigns weight and bias."""
    for bias in (True, False):
        plain, converted = pair("square", bias=bias)
        bn = nn.BatchNorm2d(4).eval()
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias)
        fused = nn.utils.fusion.fuse_conv_bn_eval(converted.eval(), bn)
        assert_same(nn.Sequential(plain, bn).eval(), fused)
        assert fused.bias.requires_grad is nn.utils.fusion.fuse_conv_bn_eval(plain.eval(), bn).bias.requires_grad


def test_the_bias(tmp_path: Path) -> None:
    plain, converted = pair("square")
    values = torch.arange(4.0)
    parameter = converted.bias
    converted.set_bias(values.double())
    assert converted.bias is parameter
    assert torch.equal(converted.bias, values)
    save(converted, tmp_path)
    own = nn.Parameter(torch.ones(4))
    converted.bias = own
    assert converted.bias is own
    converted.bias = None
    plain.bias = None
    assert_same(plain, converted)
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        save(converted, tmp_path)
    converted.set_bias(values)
    plain.bias = nn.Parameter(values)
    assert_same(plain, converted)
    converted.set_bias(None)
    assert converted.bias is None


def masked(module: ShiftwiseConv2d) -> ShiftwiseConv2d:
    branch = module.branches[0]
    branch.set_mask(torch.ones(branch.tile_count, dtype=torch.bool))
    return module


def moved(module: ShiftwiseConv2d) -> ShiftwiseConv2d:
    branch = module.branches[0]
    branch.load_state_dict({**branch.state_dict(), "placements": branch.placements.flip(1)})
    return module


def normalised() -> ShiftwiseConv2d:
    branch = pair("square")[1].branches[0]
    return ShiftwiseConv2d(
        4, 4, (1, 1), [Branch(branch.geometry, branch.bank, branch.placements[0], None, nn.BatchNorm2d(4))]
    )


NO_SINGLE_KERNEL: dict[str, tuple[Callable[[], ShiftwiseConv2d], str]] = {
    "several branches": (lambda: layer("strips"), "the layer is the sum of 3 branches"),
    "the paper's module": (lambda: layer("paper"), "the layer is the sum of 4 branches"),
    "BatchNorm": (normalised, "a BatchNorm follows the kernel"),
    "edges": (lambda: convert(GEOMETRIES["square"](), SWConfig(edges=2)), "several edges place its tiles"),
    "masks": (lambda: masked(pair("square")[1]), "a mask leaves tiles out"),
    "other placements": (lambda: moved(pair("square")[1]), "its tiles are not placed side by side"),
}


@pytest.mark.parametrize("case", NO_SINGLE_KERNEL)
def test_layers_that_are_no_single_kernel(case: str) -> None:
    build, reason = NO_SINGLE_KERNEL[case]
    module = build()
    state = copy.deepcopy(module.state_dict())
    weight = torch.zeros(tuple(module.weight.shape))
    calls: list[Callable[[], object]] = [
        lambda: module.set_weight(weight),
        lambda: module.set_bias(torch.zeros(len(weight))),
        lambda: setattr(module, "weight", nn.Parameter(weight)),
        lambda: setattr(module, "bias", nn.Parameter(torch.zeros(len(weight)))),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=rf"{reason}.*merge\(model\) first"):
            call()
    assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())


def test_a_layer_that_was_folded_is_one_kernel_again() -> None:
    module = ShiftwiseConv2d(4, 4, (1, 1), list(normalised().eval().branches)).eval()
    module.reparameterize()
    module.set_weight(torch.ones(4, 1, 7, 7))
    assert torch.equal(module.weight, torch.ones(4, 1, 7, 7))


def test_what_does_not_fit_is_refused() -> None:
    _, converted = pair("square")
    before = converted.weight.clone()
    shapes = r"got \(4, 1, 5, 5\), expected a tensor of shape \(4, 1, 7, 7\)"
    with pytest.raises(ValueError, match=rf"ShiftwiseConv2d\.set_weight: {shapes}"):
        converted.set_weight(torch.zeros(4, 1, 5, 5))
    with pytest.raises(ValueError, match=shapes):
        converted.weight = nn.Parameter(torch.zeros(4, 1, 5, 5))
    with pytest.raises(ValueError, match=r"set_bias: got \(3,\), expected a tensor of shape \(4,\)"):
        converted.set_bias(torch.zeros(3))
    with pytest.raises(ValueError, match=r"set_weight: got list"):
        converted.set_weight([1.0])
    for value in (torch.zeros(4, 1, 7, 7), None, 3):
        with pytest.raises(TypeError, match=r"expected nn\.Parameter; layer\.set_weight\(tensor\) takes"):
            converted.weight = value
    with pytest.raises(TypeError, match=r"expected nn\.Parameter; layer\.set_bias\(tensor\) takes"):
        converted.bias = torch.zeros(4)
    assert torch.equal(converted.weight, before)


def test_training_goes_on_after_a_write() -> None:
    """The same steps as those of the original, an optimizer made before the write."""
    plain, converted = pair("square")
    optimizers = [torch.optim.SGD(module.parameters(), 0.1, momentum=0.9) for module in (plain, converted)]
    x = images(2, 4)
    for turn in range(4):
        if turn == 2:
            weight = torch.randn_like(plain.weight)
            with torch.no_grad():
                plain.weight.copy_(weight)
            converted.set_weight(weight)
        for module, optimizer in zip((plain, converted), optimizers, strict=True):
            optimizer.zero_grad()
            loss: Tensor = module(x).square().mean()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(converted.weight, plain.weight)


def test_a_stride_that_is_set_takes_effect() -> None:
    plain, converted = pair("square")
    with torch.no_grad():
        for module in (plain.eval(), converted.eval()):
            module(images(2, 4, (19, 21)))
            module.stride = (2, 3)
        assert_same(plain, converted)
