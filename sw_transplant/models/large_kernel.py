"""The large-kernel layer of SLaK and RepLKNet: parallel depthwise convolutions, each followed by BatchNorm, summed."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import nn

__all__ = ["ReparamLargeKernelConv", "conv_bn", "depthwise"]


def depthwise(channels: int, kernel_size: tuple[int, int], dilation: int = 1) -> nn.Conv2d:
    """A depthwise convolution without bias that keeps height and width.

    Raises:
        ValueError: if a side of the kernel is even, since the map could then not keep its size.
    """
    if any(side < 1 or side % 2 == 0 for side in kernel_size):
        raise ValueError(f"kernel size {kernel_size}: the sides of a depthwise kernel must be odd and positive")
    height, width = kernel_size
    padding = (dilation * (height // 2), dilation * (width // 2))
    return nn.Conv2d(channels, channels, kernel_size, padding=padding, dilation=dilation, groups=channels, bias=False)


def conv_bn(conv: nn.Conv2d) -> nn.Sequential:
    """`conv` followed by BatchNorm, under the names ``conv`` and ``bn`` of the published checkpoints."""
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(conv.out_channels)))


class ReparamLargeKernelConv(nn.Module):
    """Sum of depthwise convolutions of one input, each with a BatchNorm of its own.

    RepLKNet (Section 3, guideline 3) puts a small kernel beside the large one; SLaK (Section 3) splits the large
    kernel into two strips and keeps the small one.

    Args:
        channels: number of channels C.
        branches: every branch, under the name it has in the checkpoints: a kernel size (height, width), or several that
            run one after the other.
        dilation: of the branches that are not called ``small_conv``.
    """

    def __init__(
        self,
        channels: int,
        branches: Mapping[str, tuple[int, int] | Sequence[tuple[int, int]]],
        dilation: int = 1,
    ) -> None:
        super().__init__()
        for name, sizes in branches.items():
            step = 1 if name == "small_conv" else dilation
            if isinstance(sizes[0], int):
                self.add_module(name, conv_bn(depthwise(channels, sizes, step)))  # type: ignore[arg-type]
            else:
                chain = [conv_bn(depthwise(channels, size, step)) for size in sizes]  # type: ignore[arg-type]
                self.add_module(name, nn.Sequential(*chain))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        first, *others = self.children()
        out = first(x)
        for branch in others:
            out = out + branch(x)
        return out
