"""The matrix of a whole map: the same as conv2d, for any geometry, with its gradients."""

import pytest
import torch
import torch.nn.functional as F

from sw_transplant.ops.whole_map import diagonal_sums, toeplitz_matrix, whole_map_conv, whole_map_product

# map, kernel, padding on both sides (vertical, horizontal), stride, filters per channel
GEOMETRIES = {
    "square": ((7, 7), (7, 7), (3, 3), (1, 1), 1),
    "strip beyond the map": ((5, 6), (13, 3), (6, 1), (1, 1), 1),
    "stride": ((9, 8), (5, 7), (2, 3), (2, 3), 1),
    "filters": ((4, 5), (3, 3), (1, 1), (1, 1), 3),
    "even, valid": ((8, 9), (4, 2), (0, 0), (1, 1), 1),
    "wide padding": ((3, 4), (3, 3), (4, 5), (1, 2), 2),
    "one position": ((1, 1), (7, 7), (3, 3), (1, 1), 1),
}


def case(name):
    """x, weight, bias and the arguments of conv2d; all require a gradient."""
    size, kernel, padding, stride, filters = GEOMETRIES[name]
    torch.manual_seed(len(name))
    options = {"dtype": torch.float64, "requires_grad": True}
    x = torch.randn(2, 3, *size, **options)
    weight, bias = torch.randn(3 * filters, 1, *kernel, **options), torch.randn(3 * filters, **options)
    return x, weight, bias, padding, stride


@pytest.mark.parametrize("name", GEOMETRIES)
def test_it_is_the_convolution(name):
    x, weight, bias, padding, stride = case(name)
    expected = F.conv2d(x, weight, bias, stride, padding, 1, 3)
    size, out_size = tuple(x.shape[2:]), tuple(expected.shape[2:])
    matrix = toeplitz_matrix(weight, padding, size, out_size, stride)
    assert matrix.shape == (len(weight), out_size[0] * out_size[1], size[0] * size[1])
    for y in (
        whole_map_product(x, matrix, bias, out_size),
        whole_map_conv(x, weight, bias, padding, out_size, stride),
        whole_map_product(x, matrix, None, out_size) + bias[:, None, None],
    ):
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(whole_map_product(x, matrix, bias, out_size), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients(name):
    x, weight, bias, padding, stride = case(name)
    expected = F.conv2d(x, weight, bias, stride, padding, 1, 3)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, weight, bias), grad)
    y = whole_map_conv(x, weight, bias, padding, tuple(expected.shape[2:]), stride)
    for got, want in zip(torch.autograd.grad(y, (x, weight, bias), grad), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_second_derivatives():
    x, weight, _, padding, stride = case("stride")
    out_size = (5, 3)
    assert torch.autograd.gradgradcheck(
        lambda x, weight: whole_map_conv(x[:1, :2, :4, :4], weight[:2], None, padding, out_size[::-1], stride)[
            :, :, :1
        ],
        (x.detach()[:1, :2, :4, :4].requires_grad_(), weight.detach()[:2].requires_grad_()),
    )


def test_only_x_and_the_kernel_are_saved():
    x, weight, _, padding, _ = case("square")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), lambda _: None):
        whole_map_conv(x, weight, None, padding, (7, 7))
    assert sorted(saved) == sorted([x.numel(), weight.numel()])


@pytest.mark.parametrize(
    ("outputs", "inputs", "taps", "origin", "stride"), [(5, 5, 7, 3, 1), (4, 9, 5, 2, 3), (1, 3, 2, 0, 2)]
)
def test_diagonal_sums(outputs, inputs, taps, origin, stride):
    matrix = torch.randn(2, outputs, inputs, dtype=torch.float64)
    expected = torch.zeros(2, taps, dtype=torch.float64)
    for o in range(outputs):
        for a in range(taps):
            if 0 <= stride * o + a - origin < inputs:
                expected[:, a] += matrix[:, o, stride * o + a - origin]
    torch.testing.assert_close(diagonal_sums(matrix, taps, origin, stride), expected, rtol=1e-13, atol=1e-13)
