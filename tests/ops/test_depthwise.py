"""Depthwise convolutions and weight gradients, whichever way they are computed."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sw_transplant.ops import depthwise
from sw_transplant.ops.depthwise import (
    DepthwiseConv2d,
    depthwise_weight_grad,
    is_channels_last,
    lines_weight_grad,
)

# batch, map, kernel, origin: one case for each way that depthwise_weight_grad has on a CPU, and odd ones
CASES = {
    "channels_last": (2, (16, 15), (7, 7), (3, 3)),
    "lines, tall": (2, (16, 12), (13, 3), (6, 1)),
    "lines, wide": (2, (12, 16), (3, 13), (1, 6)),
    "lines, beyond the map": (8, (6, 7), (13, 13), (6, 6)),
    "native": (1, (7, 7), (7, 7), (3, 3)),
    "lines, even and off centre": (3, (11, 13), (6, 2), (4, 0)),
    "lines, rows cut": (4, (9, 9), (5, 3), (-2, 3)),
}


def reference(x, grad, size, origin):
    weight = torch.zeros(x.shape[1], 1, *size, dtype=x.dtype, requires_grad=True)
    padded = F.pad(x, (origin[1], size[1] - 1 - origin[1], origin[0], size[0] - 1 - origin[0]))
    return torch.autograd.grad(F.conv2d(padded, weight, groups=x.shape[1]), weight, grad)[0]


@pytest.mark.parametrize("function", [depthwise_weight_grad, lines_weight_grad])
@pytest.mark.parametrize("name", CASES)
def test_weight_gradient(name, function):
    batch, size, kernel, origin = CASES[name]
    torch.manual_seed(len(name))
    x, grad = (torch.randn(batch, 5, *size, dtype=torch.float64) for _ in range(2))
    got = function(x, grad, kernel, origin)
    assert got.is_contiguous()
    assert got.shape == (5, 1, *kernel)
    torch.testing.assert_close(got, reference(x, grad, kernel, origin), rtol=1e-12, atol=1e-11)
    single = function(x.float(), grad.float(), kernel, origin)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, got.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("lines", "native"))])
def test_lines_are_taken_where_the_case_says_so(name, monkeypatch):
    batch, size, kernel, origin = CASES[name]
    taken = []
    monkeypatch.setattr(depthwise, "lines_weight_grad", lambda *a: taken.append(a) or lines_weight_grad(*a))
    x = torch.randn(batch, 5, *size)
    depthwise_weight_grad(x, x, kernel, origin)
    assert bool(taken) == name.startswith("lines")


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kernel", [(5, 21), (21, 5), (15, 15), (7, 7)])
def test_convolution(kernel, dtype, layout):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 12, 14).to(dtype).contiguous(memory_format=layout)
    weight, bias = torch.randn(12, 1, *kernel).to(dtype), torch.randn(12).to(dtype)
    geometry = ((2, 1), (kernel[0] // 2, kernel[1] // 2), (1, 1))
    layer = DepthwiseConv2d(weight, *geometry)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), *geometry, 6)
    first = layer(x, bias)
    assert relative_error(first, expected) <= {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 5e-3)
    for _ in range(2):  # with packed weights, where it packs
        assert torch.equal(layer(x, bias), first)
    assert relative_error(layer(x[:1], None), F.conv2d(x[:1].double(), weight.double(), None, *geometry, 6)) <= 5e-3


def test_margins():
    x, weight = torch.randn(1, 2, 6, 7, dtype=torch.float64), torch.randn(2, 1, 3, 3, dtype=torch.float64)
    y = DepthwiseConv2d(weight, (1, 1), (0, 0), (1, 1), (3, -1, 0, 2))(x, None)
    assert torch.equal(y, F.conv2d(F.pad(x, (3, -1, 0, 2)), weight, groups=2))


def packed(layer, x, times=3):
    for _ in range(times):
        layer(x, None)
    return layer._packed is not None


def test_weights_are_packed_where_that_helps_and_nobody_looks():
    x = torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4, 1, 7, 7)

    def layer(weight=weight):
        return DepthwiseConv2d(weight, (1, 1), (3, 3), (1, 1))

    assert packed(layer(), x)
    assert not packed(layer(), x, times=1)
    assert not packed(layer(), x.contiguous())
    wide = DepthwiseConv2d(torch.randn(4, 1, 5, 15), (1, 1), (2, 7), (1, 1))
    assert packed(wide, x.contiguous())  # PyTorch has no fast way for contiguous maps
    assert not packed(layer(weight.double()), x.double())
    assert not packed(layer(weight.requires_grad_()), x)
    weight.requires_grad_(False)
    differentiated = layer()
    y = [differentiated(x.clone().requires_grad_(), None) for _ in range(3)]
    assert differentiated._packed is None
    assert all(one.requires_grad for one in y)
    counted = layer()
    with FlopCounterMode(display=False) as counter:
        for _ in range(3):
            counted(x, None)
    assert counter.get_total_flops() == 3 * 2 * x.numel() * 49
    traced = layer()
    torch.jit.trace(lambda x: traced(x, None), x)
    assert traced._packed is None


def test_memory_formats_as_convolutions_see_them():
    """On slices, steps and turned maps of both formats the output of conv2d tells."""
    shapes = itertools.product((1, 3), (1, 2, 5), (1, 4), (1, 5))
    seen = set()
    for (batch, channels, height, width), layout, cut in itertools.product(
        shapes, (torch.contiguous_format, torch.channels_last), range(4)
    ):
        base = torch.randn(2 * batch, 2 * channels, 2 * height, 2 * width).contiguous(memory_format=layout)
        x = base[:batch, channels:, :height, :width]
        x = [x, x.contiguous(memory_format=layout), base[:batch, :channels], x.mT][cut]
        y = F.conv2d(x, torch.randn(channels, 1, 3, 3), padding=1, groups=channels)
        if y.is_contiguous() != y.is_contiguous(memory_format=torch.channels_last):
            assert is_channels_last(x) == (not y.is_contiguous()), (x.shape, x.stride())
            seen.add(is_channels_last(x))
    assert seen == {False, True}
