"""Depthwise convolution by PyTorch, in the memory layout in which it is fast, and its weight gradient.

On a CPU, some depthwise convolutions of PyTorch run 10 to 30 times slower than others, for want of a oneDNN kernel:
contiguous maps with kernels wider than 14 taps, and most weight gradients. docs/design/forms.md has the measurements.
One never ends (docs/troubleshooting.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sw_transplant.ops.tracing import is_transformed
from sw_transplant.ops.whole_map import Size, diagonal_sums

WIDEST = 14  # taps along a row that oneDNN's kernels for contiguous maps take
NATIVE = (torch.float32, torch.bfloat16)  # what oneDNN has kernels for
HANGING_CHANNELS = 16  # up to which wide kernels in bfloat16 and channels_last may never return
ENOUGH_POSITIONS = 256  # of all maps of a batch: below that, the overhead of several products outweighs their speed


class Step(NamedTuple):
    """What a convolution does with maps that are just like one it was shown, with nothing left to decide.

    Attributes:
        run: a map to the output, laid out as the map is.
        dispatched: it is PyTorch's convolution, which modes of dispatch, transforms and tangents go through, and for
            which a map of another dtype or device is an error, as for nn.Conv2d.
    """

    run: Callable[[Tensor], Tensor]
    dispatched: bool


class DepthwiseConv2d:
    """A depthwise convolution with given weights, for one size of map: `torch.nn.functional.conv2d` with groups = C.

    On a CPU, what runs more than once on maps in channels_last without gradients gets its weights packed as oneDNN
    wants them: PyTorch packs them in every call, which takes longer than a small convolution itself (40 x 40 x 40, 7 x
    7: 0.14 and 0.09 ms). The same call gives the same bits, packed or not yet. Small contiguous maps are not turned
    for that: in a loop of their own it pays (192 x 7 x 7: 0.071 and 0.055 ms), within a network it costs (MCUNet, 160
    x 11 x 11: 0.15 and 0.20 ms).

    Args:
        weight: (C_out, 1, kh, kw), C_out a multiple of C.
        stride, padding, dilation: of rows and columns.
        margins: what `torch.nn.functional.pad` adds to the map first, or None.
    """

    def __init__(
        self, weight: Tensor, stride: Size, padding: Size, dilation: Size, margins: Sequence[int] | None = None
    ) -> None:
        self.stride, self.padding, self.dilation, self.margins = stride, padding, dilation, margins
        native = weight.device.type == "cpu" and weight.dtype in NATIVE and not may_hang(weight)
        self._too_wide = native and weight.shape[3] > WIDEST
        self._packs = native and not weight.requires_grad
        # Of the middle of a kernel, PyTorch would make a copy in every call.
        self.weight = weight.contiguous() if self._packs else weight
        self._runs = 0
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (B, C, H, W), bias (C_out,) -> (B, C_out, H', W'), in whatever memory format is at hand."""
        if self.margins is not None:
            x = F.pad(x, self.margins)
        if self._packs and runs_as_it_is(x):
            if self._turns(x):
                x = x.contiguous(memory_format=torch.channels_last)
                self._runs += 1
                if self._runs > 1 and x.dtype is self.weight.dtype:
                    return torch.ops.mkldnn._convolution_pointwise.default(x, *self._rest(x, bias))  # type: ignore[no-any-return]
        elif self._too_wide:
            x = x.contiguous(memory_format=torch.channels_last)
        return depthwise_conv2d(x, self.weight, bias, self.stride, self.padding, self.dilation)

    def step(self, x: Tensor, bias: Tensor | None) -> Step:
        """What a call does with maps that are just like this one, where `runs_as_it_is`, without asking again."""
        layout = layout_of(x)
        if self.margins is not None or not self._packs or x.dtype is not self.weight.dtype:
            return Step(lambda x: self(x, bias).contiguous(memory_format=layout), False)
        if self._turns(x):
            run, turned = torch.ops.mkldnn._convolution_pointwise.default, torch.channels_last
            rest = self._rest(x, bias)
            return Step(
                lambda x: run(x.contiguous(memory_format=turned), *rest).contiguous(memory_format=layout), False
            )
        conv2d, others = F.conv2d, (self.weight, bias, self.stride, self.padding, self.dilation, x.shape[1])
        return Step(lambda x: conv2d(x, *others), True)  # whose output is laid out as the map is

    def _turns(self, x: Tensor) -> bool:
        """Whether a call that packs takes the map in channels_last."""
        return self._too_wide or is_channels_last(x)

    def _rest(self, x: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        """What PyTorch's convolution with packed weights takes after a map in channels_last, with the channels of x."""
        geometry = self.padding, self.stride, self.dilation, x.shape[1]
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *geometry, x.shape)
        return (self._packed, bias, *geometry, "none", [], "")


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Size, padding: Size, dilation: Size
) -> Tensor:
    """`torch.nn.functional.conv2d` with groups = C, but for one case that may never return.

    That case is computed in float32, ten times faster than in bfloat16 on contiguous maps, and rounded once.
    """
    groups = x.shape[1]
    if x.dtype is not torch.bfloat16 or not may_hang(weight):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    with torch.autocast("cpu", enabled=False):
        wide = x.float().contiguous(memory_format=torch.channels_last)
        y = F.conv2d(wide, weight.float(), None if bias is None else bias.float(), stride, padding, dilation, groups)
        return y.to(x.dtype)


def may_hang(weight: Tensor) -> bool:
    """Whether convolutions with this weight (C_out, 1, kh, kw) on maps in channels_last may never return on a CPU.

    Measured, with oneDNN 3.13 on a CPU with AVX-512 and bfloat16: they do not with 2 to 16 channels, kernels of 15
    columns and more, stride 1, dilation 1 and outputs of at least 31 columns. What else stands beside that is left
    alone, too: on another CPU the limits may lie elsewhere.
    """
    wide = weight.shape[3] > WIDEST and weight.shape[0] <= HANGING_CHANNELS
    return wide and weight.dtype is torch.bfloat16 and weight.device.type == "cpu"


def layout_of(x: Tensor) -> torch.memory_format:
    """The memory format that PyTorch's convolutions give the output for this map."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    """Whether convolutions of PyTorch take this map, (B, C, H, W) with any strides, as channels_last.

    Where channels_last and contiguous are one and the same, as for a single channel, that is no.
    """
    if x.is_contiguous():
        return False
    if x.is_contiguous(memory_format=torch.channels_last):
        return True
    least = 1  # channels nearest to each other, then columns, rows and images: a part of a channels_last map
    for dim in (1, 3, 2, 0):
        if x.stride(dim) < least:
            return False
        least = x.stride(dim) * x.shape[dim]
    return True


def runs_as_it_is(x: Tensor) -> bool:
    """Whether nothing records or reinterprets the operators that run."""
    return not (
        (torch.is_grad_enabled() and x.requires_grad)
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._len_torch_dispatch_stack()
        or is_transformed()
    )


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
