"""Large depthwise convolutions and their weight gradients in plain PyTorch: what the Toeplitz kernels compute."""

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from sw_transplant.ops.depthwise import DepthwiseConv2d, depthwise_weight_grad
from sw_transplant.ops.whole_map import Size


def toeplitz_conv_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    origins: Sequence[int],
    bias: Tensor | None = None,
    residual: bool = False,
) -> Tensor:
    """`sw_transplant.ops.toeplitz_conv` as one `conv2d` for each kernel: same arguments, not validated here."""
    if x.numel() == 0:  # conv2d asks for at least one group
        return torch.empty_like(x, memory_format=dense_format(x))
    maps = [
        _convolve(x, weight, bias if i == 0 else None, origin)
        for i, (weight, origin) in enumerate(zip(weights, pairs(origins), strict=True))
    ]
    return reduce(add, maps + [x] * residual).contiguous(memory_format=dense_format(x))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, origin: Size) -> Tensor:
    (kh, kw), (top, left) = weight.shape[2:], origin
    if (kh, kw) == (2 * top + 1, 2 * left + 1):
        return DepthwiseConv2d(weight, (1, 1), origin, (1, 1))(x, bias)
    return DepthwiseConv2d(weight, (1, 1), (0, 0), (1, 1), (left, kw - 1 - left, top, kh - 1 - top))(x, bias)


def toeplitz_weight_grad_reference(
    x: Tensor, grad: Tensor, sizes: Sequence[int], origins: Sequence[int]
) -> list[Tensor]:
    """`sw_transplant.ops.toeplitz_weight_grad`, one kernel after the other: same arguments, not validated here."""
    channels = x.shape[1]
    if x.numel() == 0:
        return [x.new_zeros(channels, 1, *size) for size in pairs(sizes)]
    return [
        depthwise_weight_grad(x, grad, size, origin) for size, origin in zip(pairs(sizes), pairs(origins), strict=True)
    ]


def dense_format(x: Tensor) -> torch.memory_format:
    """The memory format of what the operators make of a map: channels_last if it is that and not contiguous as well."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def pairs(flat: Sequence[int]) -> list[Size]:
    """[a, b, c, d, ...] -> [(a, b), (c, d), ...]"""
    return list(zip(flat[::2], flat[1::2], strict=True))
