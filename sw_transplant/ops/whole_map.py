"""Depthwise convolution of a whole small map as one matrix product per channel (form "gemm").

    y[b, c, o] = bias[c] + sum over i of T[c, o, i] * x[b, c // m, i]

i and o number the positions of map and output, row by row; T is the Toeplitz matrix of channel c's kernel, of any
stride and padding; m is the number of filters per channel. Plain PyTorch: any device and dtype, any derivative, and
the same inputs give the same bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


def toeplitz_matrix(weight: Tensor, origin: Size, in_size: Size, out_size: Size, stride: Size = (1, 1)) -> Tensor:
    """The matrix of a depthwise kernel over a map of fixed size.

    Args:
        weight: (C_out, 1, kh, kw).
        origin: zeros (top, left) before the map.
        in_size, out_size: (H, W) of the map and (H', W') of the output.
        stride: of the output.

    Returns:
        (C_out, H' * W', H * W), dtype and device of weight; differentiable.
    """
    padding = []
    for axis in (1, 0):  # as F.pad takes them
        first = origin[axis] - stride[axis] * (
            out_size[axis] - 1
        )  # the tap that the last output has at the first input
        padding += [-first, in_size[axis] + origin[axis] - weight.shape[2 + axis]]
    taps = F.pad(weight[:, 0], padding)
    # Windows of the taps from the last output to the first, each as large as the map: a view.
    windows = taps.unfold(1, in_size[0], stride[0]).unfold(2, in_size[1], stride[1])
    return windows.flip(1, 2).reshape(weight.shape[0], out_size[0] * out_size[1], in_size[0] * in_size[1])


def whole_map_product(x: Tensor, matrix: Tensor, bias: Tensor | None, out_size: Size) -> Tensor:
    """The product with a matrix that is there already.

    Args:
        x: (B, C, H, W).
        matrix: (C_out, H' * W', H * W) of :func:`toeplitz_matrix`, C_out a multiple of C.
        bias: (C_out,) or None.
        out_size: (H', W').

    Returns:
        (B, C_out, H', W'), dtype of x and matrix, which are of one dtype.
    """
    (batch, channels), (filters, outputs, inputs) = x.shape[:2], matrix.shape
    matrices = matrix.reshape(channels, filters // channels * outputs, inputs)
    y = _products(_maps(x), matrices.mT).reshape(batch, filters, *out_size)
    return y if bias is None else y + bias[:, None, None]


def _maps(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (C, B, H * W).

    A GPU's matrix product wants neighbours in memory: of a channels_last map it would make a copy that no compiler
    sees.
    """
    if x.is_cuda:
        x = x.contiguous()
    return x.reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:])).transpose(0, 1)  # not -1: a batch may be empty


def _products(maps: Tensor, matrices: Tensor) -> Tensor:
    """(C, B, I) times (C, I, O) -> (B, C, O)."""
    if not maps.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.bmm(maps, matrices).transpose(0, 1)
    # cuBLAS writes in the order of the output; on a CPU that would be many times slower than a copy afterwards.
    products = maps.new_empty(maps.shape[1], maps.shape[0], matrices.shape[2])
    torch.bmm(maps, matrices, out=products.transpose(0, 1))
    return products


def whole_map_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, origin: Size, out_size: Size, stride: Size = (1, 1)
) -> Tensor:
    """The product with a kernel's matrix, which is made anew for the forward and for the backward pass.

    Args:
        x: (B, C, H, W).
        weight: (C_out, 1, kh, kw), C_out a multiple of C; dtype of x.
        bias: (C_out,) or None.
        origin, out_size, stride: as in :func:`toeplitz_matrix`.

    Returns:
        (B, C_out, H', W'). Saved for the backward pass: x and weight.
    """
    y: Tensor = _WholeMapConv.apply(x, weight, origin, out_size, stride)
    return y if bias is None else y + bias[:, None, None]


class _WholeMapConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, origin: Size, out_size: Size, stride: Size) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.lattice = origin, out_size, stride
        matrix = toeplitz_matrix(weight, origin, (x.shape[2], x.shape[3]), out_size, stride)
        y = whole_map_product(x, matrix, None, out_size)
        if torch.compiler.is_compiling() or len(y) >= 2:
            return y
        return y.clone()  # a view made in here could not be written to; larger batches are copied

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        origin, out_size, stride = ctx.lattice
        channels, in_size = x.shape[1], (x.shape[2], x.shape[3])
        positions = weight.shape[0] // channels * math.prod(out_size)
        grads = _maps(grad.reshape(x.shape[0], channels, positions, 1))  # (C, B, m * H' * W')
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            matrix = toeplitz_matrix(weight, origin, in_size, out_size, stride)
            grad_x = _products(grads, matrix.reshape(channels, positions, matrix.shape[2])).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            grad_matrix = torch.bmm(grads.mT, _maps(x))
            grad_weight = _kernel_of(
                grad_matrix.reshape(weight.shape[0], *out_size, *in_size), weight.shape[2:], origin, stride
            )
        return grad_x, grad_weight, None, None, None


def _kernel_of(matrix: Tensor, size: Size, origin: Size, stride: Size) -> Tensor:
    """The adjoint of :func:`toeplitz_matrix`: (C_out, H', W', H, W) -> (C_out, 1, kh, kw)."""
    across = diagonal_sums(matrix.transpose(2, 3), size[1], origin[1], stride[1])  # (C_out, H', H, kw)
    down = diagonal_sums(across.permute(0, 3, 1, 2), size[0], origin[0], stride[0])  # (C_out, kw, kh)
    return down.transpose(1, 2)[:, None]


def diagonal_sums(matrix: Tensor, taps: int, origin: int, stride: int = 1) -> Tensor:
    """Sums of a matrix along its diagonals, each in a fixed order.

    Args:
        matrix: (..., O, I).
        taps, origin, stride: of the one-dimensional kernel.

    Returns:
        (..., taps), element a is the sum over o of matrix[..., o, stride * o + a - origin].
    """
    outputs, inputs = matrix.shape[-2:]
    width = inputs + stride * outputs
    # Rows of this width, read as rows that are `stride` shorter: each lies that much further right than the one before.
    skewed = F.pad(matrix.flip(-2), (0, stride * outputs)).flatten(-2)[..., : outputs * (width - stride)]
    sums = skewed.unflatten(-1, (outputs, width - stride)).sum(-2)
    first = stride * (outputs - 1) - origin
    return F.pad(sums, (-first, first + taps - (width - stride)))
