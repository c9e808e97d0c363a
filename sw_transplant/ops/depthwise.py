"""Depthwise convolution by PyTorch, in the memory layout in which it is fast, and its weight gradient.

On a CPU, PyTorch leaves depthwise convolutions to oneDNN, whose kernels reach 100 to 500 GFLOP/s on two cores; some
cases have no kernel and run 10 to 30 times slower. Measured with torch 2.15 (oneDNN 3.13) on an AVX-512 machine,
float32, maps 56 to 7, batch 1 and 8:

- forward, contiguous: kernels wider than 14 taps (5 x 51: 137 ms, 31 x 31: 252 ms; 51 x 5: 13 ms). The same in
  channels_last with both copies: 10 and 9 ms. bfloat16 is alike.
- weight gradient, contiguous: every kernel on maps of 28 and more (51 x 5: 260 ms, 7 x 7: 96 ms). In channels_last:
  square kernels up to 14 taps on maps twice their size are fast (7 x 7: 11 ms), others are not. As matrix products of
  whole lines (:func:`lines_weight_grad`): 51 x 5 and 5 x 51: 18 ms, 31 x 31: 63 ms instead of 419.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sw_transplant.ops.whole_map import Size, diagonal_sums

WIDEST = 14  # taps along a row that oneDNN's kernels for contiguous maps take
ENOUGH_POSITIONS = 256  # of all maps of a batch: below that, the overhead of several products outweighs their speed


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Size, padding: Size, dilation: Size
) -> Tensor:
    """`torch.nn.functional.conv2d` with groups = C, on a CPU in channels_last where contiguous maps have no kernel.

    Args:
        x: (B, C, H, W).
        weight: (C_out, 1, kh, kw), C_out a multiple of C.
        bias: (C_out,) or None.
        stride, padding, dilation: of rows and columns.

    Returns:
        (B, C_out, H', W'), in whatever memory format is at hand.
    """
    if x.device.type == "cpu" and weight.shape[3] > WIDEST and x.dtype in (torch.float32, torch.bfloat16):
        x = x.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, bias, stride, padding, dilation, x.shape[1])


def depthwise_weight_grad(x: Tensor, grad: Tensor, size: Size, origin: Size) -> Tensor:
    """The weight gradient of a convolution with stride 1 and an output as large as the map, in the fastest way known.

    Args:
        x, grad: (B, C, H, W), the map and the gradient of the output.
        size: taps (kh, kw).
        origin: zeros (top, left) before the map.

    Returns:
        (C, 1, kh, kw), dtype of x.
    """
    batch, channels, height, width = x.shape
    shorter, longer = sorted(size)
    layout = torch.contiguous_format
    if x.device.type == "cpu":
        if longer <= WIDEST and longer < 2 * shorter and min(height, width) >= 2 * longer and x.dtype != torch.float64:
            layout = torch.channels_last
        elif batch * height * width >= ENOUGH_POSITIONS:
            return lines_weight_grad(x, grad, size, origin)
    padded = F.pad(x, (origin[1], size[1] - 1 - origin[1], origin[0], size[0] - 1 - origin[0]))
    _, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad.contiguous(memory_format=layout),
        padded.contiguous(memory_format=layout),
        x.new_empty(channels, 1, *size),  # its values do not matter
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        channels,
        [False, True, False],
    )
    return grad_weight.contiguous()  # type: ignore[no-any-return]


def lines_weight_grad(x: Tensor, grad: Tensor, size: Size, origin: Size) -> Tensor:
    """As :func:`depthwise_weight_grad`, as one matrix product for each line along the kernel's long side.

    The product of all gradients with all maps, contracted over images and the short side, has the gradient of a line's
    taps in the sums of its diagonals. The same inputs give the same bits.
    """
    if size[0] < size[1]:
        turned = lines_weight_grad(x.mT, grad.mT, (size[1], size[0]), (origin[1], origin[0]))
        return turned.mT.contiguous()
    lines, (channels, height) = size[1], x.shape[1:3]
    # Rows of all images side by side, with zeros between them: a shift of the whole is a shift of each.
    padded = F.pad(x, (origin[1], lines - 1 - origin[1]))
    maps = padded.permute(1, 2, 0, 3).reshape(channels, height, -1)
    grads = F.pad(grad, (0, lines - 1)).permute(1, 2, 0, 3).reshape(channels, height, -1)
    length = maps.shape[2] - (lines - 1)
    grads = grads[:, :, :length]
    taps = [diagonal_sums(torch.bmm(grads, maps[:, :, j : j + length].mT), size[0], origin[0]) for j in range(lines)]
    return torch.stack(taps, dim=-1)[:, None]
