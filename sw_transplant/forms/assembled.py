"""Form "assembled": the weights are shifted instead of the features; large kernels, and one convolution for each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from sw_transplant.equivalence import gather_kernel, regather_kernel
from sw_transplant.forms.placed import Biases, Call, DenseKernel, Outputs, Placed
from sw_transplant.geometry import Extent, enclose
from sw_transplant.ops.depthwise import DepthwiseConv2d, Step
from sw_transplant.ops.tracing import is_observed


class Sum(NamedTuple):
    """One output: the sum of the responses of dense kernels, and of the map itself where ``residual``."""

    kernels: list[DenseKernel]
    residual: bool


class Convolutions(NamedTuple):
    """One output: the sum of depthwise convolutions, and of the map itself where ``residual``."""

    layers: list[DepthwiseConv2d]
    residual: bool


def prepare_assembled(outputs: Outputs, call: Call) -> list[Convolutions]:
    """Per output the large kernels, as few as possible without adding work (see :func:`join_kernels`).

    An identity is one more tap of a kernel; where it is all there is, the map stays as it is.
    """
    return [
        convolutions(add_up(branches, call, residual=all(branch.identity for branch in branches)), call)
        for branches in outputs
    ]


def add_up(branches: Sequence[Placed], call: Call, *, residual: bool) -> Sum:
    """The joined kernels of the branches; ``residual`` keeps an identity among them beside the kernels."""
    first = next((branch for branch in branches if branch.identity), None) if residual else None
    kernels = join_kernels([dense_kernel(branch) for branch in branches if branch is not first])
    kernels = [_within_reach(kernel, call) for kernel in kernels]
    kernels = [
        kernel if kernel.weight.dtype is call.dtype else DenseKernel(kernel.weight.to(call.dtype), kernel.extent)
        for kernel in kernels
    ]
    return Sum(kernels, first is not None)


def _within_reach(kernel: DenseKernel, call: Call) -> DenseKernel:
    """The kernel without the rows and columns that lie outside the map for every output: 47 taps are 27 at 14 x 14.

    Where none is left, as under a large padding, one stays, before the map: it reads zeros, and has a gradient of zero.
    """
    weight, origin, size = kernel.weight, list(kernel.extent.origin), list(kernel.extent.kernel_size)
    for axis in range(2):
        step, before = kernel.extent.dilation[axis], kernel.extent.origin[axis]
        furthest = (call.out_size[axis] - 1) * call.stride[axis]
        first = max(0, -((furthest - before) // step))
        last = min((before + call.in_size[axis] - 1) // step, size[axis] - 1)
        if first > last:
            weight, origin[axis], size[axis] = weight.narrow(2 + axis, 0, 1), furthest + 1, 1
            continue
        if last + 1 - first == size[axis]:
            continue
        weight = weight.narrow(2 + axis, first, last + 1 - first)
        origin[axis], size[axis] = before - step * first, last + 1 - first
    if weight is kernel.weight:
        return kernel
    return DenseKernel(weight, Extent((size[0], size[1]), (origin[0], origin[1]), kernel.extent.dilation))


def dense_kernel(branch: Placed) -> DenseKernel:
    """The kernel that a placed branch makes; its scale is multiplied in float32 at least."""
    if branch.inverse is None or is_observed():
        weight = gather_kernel(branch.bank, branch.index, branch.extent.kernel_size)
    else:
        weight = regather_kernel(branch.bank, branch.index, branch.inverse, branch.extent.kernel_size)
    if branch.scale is not None:
        weight = (weight * branch.scale[:, None, None, None]).to(weight.dtype)
    return DenseKernel(weight, branch.extent)


def join_kernels(kernels: Sequence[DenseKernel]) -> list[DenseKernel]:
    """Adds kernels up into one wherever the sum has no more taps than its parts.

    A 5 x 5 vanishes in a 51 x 5, and dilated kernels in the square that they lie in. A 51 x 5 and a 5 x 51 stay two:
    their sum would be a 51 x 51 with five times the work.
    """
    if len(kernels) == 1:
        return list(kernels)
    groups = join_extents([kernel.extent for kernel in kernels])
    return [reduce(add_kernels, [kernels[i] for i in members]) for _, members in groups]


def join_extents(extents: Sequence[Extent]) -> list[tuple[Extent, list[int]]]:
    """The extents of :func:`join_kernels`, each with the numbers of those that it is made of."""
    joined: list[tuple[Extent, list[int]]] = []
    for number in sorted(range(len(extents)), key=lambda i: -extents[i].taps):
        extent = extents[number]
        for i, (other, members) in enumerate(joined):
            outer = enclose(other, extent)
            if outer.taps <= other.taps + extent.taps:
                joined[i] = outer, [*members, number]
                break
        else:
            joined.append((extent, [number]))
    return joined


def add_kernels(a: DenseKernel, b: DenseKernel) -> DenseKernel:
    """The one kernel whose response is the sum of both. Exact but for the rounding of taps that meet."""
    outer = enclose(a.extent, b.extent)
    return DenseKernel(embed(a, outer) + embed(b, outer), outer)


def embed(kernel: DenseKernel, outer: Extent) -> Tensor:
    """The kernel's taps on the lattice of an enclosing extent, zeros elsewhere."""
    weight, inner = kernel.weight, kernel.extent
    for axis in range(2):
        spread = inner.dilation[axis] // outer.dilation[axis]
        dim = 2 + axis
        taps = (weight.shape[dim] - 1) * spread + 1
        if spread > 1:  # write the gaps out as zeros
            gaps = weight.unsqueeze(dim + 1)
            gaps = F.pad(gaps, [0, 0] * (gaps.dim() - dim - 2) + [0, spread - 1])
            weight = gaps.flatten(dim, dim + 1).narrow(dim, 0, taps)
        before = (outer.origin[axis] - inner.origin[axis]) // outer.dilation[axis]
        after = outer.kernel_size[axis] - before - taps
        weight = F.pad(weight, (before, after) if axis else (0, 0, before, after))
    return weight


def convolutions(entry: Sum, call: Call) -> Convolutions:
    """A sum of dense kernels, ready to run."""
    return Convolutions([_convolution(kernel, call) for kernel in entry.kernels], entry.residual)


def _convolution(kernel: DenseKernel, call: Call) -> DepthwiseConv2d:
    """A convolution pads both sides alike; where that does not give the wanted output, the map is padded or cut."""
    padding, after, symmetric = kernel.extent.origin, [], True
    for axis in range(2):
        out, stride = call.out_size[axis], call.stride[axis]
        reach = kernel.extent.dilation[axis] * (kernel.extent.kernel_size[axis] - 1)
        after.append((out - 1) * stride + reach + 1 - call.in_size[axis] - padding[axis])
        # Up to stride - 1 rows at the end may go unread: a convolution that pads that much more gives the same output.
        symmetric = symmetric and padding[axis] >= 0 and 0 <= padding[axis] - after[axis] < stride
    if symmetric:
        return DepthwiseConv2d(kernel.weight, call.stride, padding, kernel.extent.dilation)
    margins = (padding[1], after[1], padding[0], after[0])
    return DepthwiseConv2d(kernel.weight, call.stride, (0, 0), kernel.extent.dilation, margins)


def execute_assembled(x: Tensor, plan: list[Convolutions], biases: Biases, call: Call) -> list[Tensor]:
    """One depthwise convolution per large kernel. Memory: that of the original convolutions."""
    return [run(x, entry, bias, call) for entry, bias in zip(plan, biases, strict=True)]


def run(x: Tensor, entry: Convolutions, bias: Tensor | None, call: Call) -> Tensor:
    """The responses of all kernels of an output, added up."""
    if not entry.layers:
        y = x[:, :, :: call.stride[0], :: call.stride[1]]
        return y if bias is None else y + bias[:, None, None]
    first, *others = entry.layers
    y = first(x, bias)
    for layer in others:
        y += layer(x, None)
    return y.add_(x) if entry.residual else y


def shorten(like: Tensor, entry: Convolutions, bias: Tensor | None, call: Call) -> Step | None:
    """What :func:`run` does with maps just like this one, decided ahead; None where there is nothing to decide."""
    if entry.residual or not entry.layers or like.dtype is not call.dtype or like.shape[2:] != call.in_size:
        return None
    first, *others = [layer.step(like, bias if i == 0 else None) for i, layer in enumerate(entry.layers)]
    if not others:
        return first

    def total(x: Tensor) -> Tensor:
        y = first.run(x)
        for step in others:
            y += step.run(x)
        return y

    return Step(total, False)
