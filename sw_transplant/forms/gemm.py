"""Form "gemm": a whole small map at once, as one matrix product per channel."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from sw_transplant.forms.assembled import add_kernels, dense_kernel, embed
from sw_transplant.forms.placed import Biases, Call, DenseKernel, Outputs
from sw_transplant.geometry import Extent
from sw_transplant.ops.tracing import is_transformed
from sw_transplant.ops.whole_map import toeplitz_matrix, whole_map_conv, whole_map_product


def prepare_gemm(outputs: Outputs, call: Call) -> list[DenseKernel | Tensor]:
    """Per output the matrix of all its kernels, or, while they are trained, the one kernel that it is made of.

    A matrix has C_out * H_out * W_out * H * W elements. Training keeps the kernel instead, and makes the matrix where
    it is needed, in the forward and in the backward pass.
    """
    kernels = [_undilated(reduce(add_kernels, map(dense_kernel, branches)), call.dtype) for branches in outputs]
    return [
        kernel
        if torch.is_grad_enabled() and kernel.weight.requires_grad and not is_transformed()
        else toeplitz_matrix(kernel.weight, kernel.extent.origin, call.in_size, call.out_size, call.stride)
        for kernel in kernels
    ]


def _undilated(kernel: DenseKernel, dtype: torch.dtype) -> DenseKernel:
    """The kernel in this dtype, with the gaps of its dilation written out as zeros."""
    (kh, kw), (dh, dw) = kernel.extent.kernel_size, kernel.extent.dilation
    outer = Extent((dh * (kh - 1) + 1, dw * (kw - 1) + 1), kernel.extent.origin)
    return DenseKernel(embed(kernel, outer).to(dtype), outer)


def execute_gemm(x: Tensor, plan: list[DenseKernel | Tensor], biases: Biases, call: Call) -> list[Tensor]:
    """One batched matrix product per output. Memory: the matrices, which eval keeps and training does not."""
    return [
        whole_map_product(x, entry, bias, call.out_size)
        if isinstance(entry, Tensor)
        else whole_map_conv(x, entry.weight, bias, entry.extent.origin, call.out_size, call.stride)
        for entry, bias in zip(plan, biases, strict=True)
    ]
