"""Large depthwise convolutions and their weight gradients in plain PyTorch: what the Toeplitz kernels compute."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


def toeplitz_conv_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    origins: Sequence[int],
    bias: Tensor | None = None,
    residual: bool = False,
) -> Tensor:
    """`sw_transplant.ops.toeplitz_conv` as one `conv2d` for each kernel: same arguments, not validated here."""
    if x.numel() == 0:  # conv2d asks for at least one group
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    out = bias[:, None, None].expand_as(x) if bias is not None else None
    if residual:
        out = x if out is None else out + x
    for weight, origin in zip(weights, pairs(origins), strict=True):
        response = F.conv2d(_padded(x, weight.shape[2:], origin), weight, groups=x.shape[1])
        out = response if out is None else out + response
    return out.contiguous()  # type: ignore[union-attr]


def toeplitz_weight_grad_reference(
    x: Tensor, grad: Tensor, sizes: Sequence[int], origins: Sequence[int]
) -> list[Tensor]:
    """`sw_transplant.ops.toeplitz_weight_grad` by PyTorch's own gradient of `conv2d`."""
    channels = x.shape[1]
    if x.numel() == 0:
        return [x.new_zeros(channels, 1, *size) for size in pairs(sizes)]
    results = []
    for size, origin in zip(pairs(sizes), pairs(origins), strict=True):
        weight = x.new_empty(channels, 1, *size)  # its values do not matter
        padded = _padded(x, size, origin)
        _, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, padded, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], channels, [False, True, False]
        )
        results.append(grad_weight.contiguous())
    return results


def pairs(flat: Sequence[int]) -> list[Size]:
    """[a, b, c, d, ...] -> [(a, b), (c, d), ...]"""
    return list(zip(flat[::2], flat[1::2], strict=True))


def _padded(x: Tensor, size: Sequence[int], origin: Size) -> Tensor:
    """x with the zeros (negative: without the rows) that make the output as large as x."""
    (kh, kw), (top, left) = size, origin
    return F.pad(x, (left, kw - 1 - left, top, kh - 1 - top))
