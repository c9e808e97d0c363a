"""Where kernels lie over a map: padding, dilation, output sizes, and the smallest kernel that encloses two others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Size = tuple[int, int]
Padding = tuple[int, int, int, int] | Literal["same"]
"""Zeros around the map: ``(top, bottom, left, right)``, or ``"same"``: as many as make the output ceil(size / stride),
the odd one after the map. For stride 1 that is nn.Conv2d's ``"same"``; for larger strides it depends on the map
(TensorFlow's convention, timm's ``Conv2dSame``)."""


@dataclass(frozen=True)
class BranchGeometry:
    """The kernel of one branch: taps ``kernel_size``, zeros ``padding``, distance ``dilation`` of neighbouring taps.

    Raises:
        ValueError: a value outside its range.
    """

    kernel_size: Size
    padding: Padding
    dilation: Size = (1, 1)

    def __post_init__(self) -> None:
        for name in ("kernel_size", "dilation"):
            value = getattr(self, name)
            if len(value) != 2 or min(value) < 1:
                raise ValueError(f"BranchGeometry.{name}: got {value}, expected two integers of at least 1")
        if self.padding != "same" and (len(self.padding) != 4 or min(self.padding) < 0):
            raise ValueError(
                f"BranchGeometry.padding: got {self.padding}, expected 'same' or (top, bottom, left, right) >= 0"
            )

    @property
    def reach(self) -> Size:
        """Rows and columns from the first tap to the last."""
        (kh, kw), (dh, dw) = self.kernel_size, self.dilation
        return dh * (kh - 1), dw * (kw - 1)

    @property
    def growth(self) -> Size:
        """By how much padding and kernel change the map's size at stride 1: equal for branches that can be added."""
        if self.padding == "same":
            return 0, 0
        top, bottom, left, right = self.padding
        return top + bottom - self.reach[0], left + right - self.reach[1]

    def filled(self, tile: int) -> BranchGeometry:
        """The kernel with rows and columns added at its end until tiles of this side fill it; the same outputs."""
        size = tuple(-(-taps // tile) * tile for taps in self.kernel_size)
        if size == self.kernel_size:
            return self
        if self.padding == "same":
            filling = (size[0] - self.kernel_size[0], size[1] - self.kernel_size[1])
            return FilledGeometry((size[0], size[1]), "same", self.dilation, filling)
        (kh, kw), (dh, dw), (top, bottom, left, right) = self.kernel_size, self.dilation, self.padding
        padding = (top, bottom + dh * (size[0] - kh), left, right + dw * (size[1] - kw))
        return BranchGeometry((size[0], size[1]), padding, self.dilation)

    def resolve(self, size: Size, stride: Size) -> tuple[int, int, int, int]:
        """The padding ``(top, bottom, left, right)`` for a map of this size."""
        if self.padding != "same":
            return self.padding
        top, bottom = _same_padding(size[0], stride[0], self.reach[0])
        left, right = _same_padding(size[1], stride[1], self.reach[1])
        return top, bottom, left, right

    def out_size(self, size: Size, stride: Size) -> Size:
        """Size of the output for a map of this size (not positive where the kernel does not fit)."""
        top, bottom, left, right = self.resolve(size, stride)
        return (
            (size[0] + top + bottom - self.reach[0] - 1) // stride[0] + 1,
            (size[1] + left + right - self.reach[1] - 1) // stride[1] + 1,
        )


@dataclass(frozen=True)
class FilledGeometry(BranchGeometry):
    """A kernel that grew, with padding "same" for what it was: ``filling`` rows and columns at its end do not count."""

    filling: Size = (0, 0)

    def resolve(self, size: Size, stride: Size) -> tuple[int, int, int, int]:
        kernel = (self.kernel_size[0] - self.filling[0], self.kernel_size[1] - self.filling[1])
        top, bottom, left, right = BranchGeometry(kernel, self.padding, self.dilation).resolve(size, stride)
        return top, bottom + self.dilation[0] * self.filling[0], left, right + self.dilation[1] * self.filling[1]


def _same_padding(size: int, stride: int, reach: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
    return total // 2, total - total // 2


@dataclass(frozen=True)
class Extent:
    """A kernel's lattice over the map: taps, the padding ``(top, left)`` before the map, and the dilation."""

    kernel_size: Size
    origin: Size
    dilation: Size = (1, 1)

    @property
    def taps(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1]


def enclose(a: Extent, b: Extent) -> Extent:
    """The smallest extent that has every tap of both: on their common lattice, else with dilation 1."""
    aligned = a.dilation == b.dilation and all(
        (p - q) % d == 0 for p, q, d in zip(a.origin, b.origin, a.dilation, strict=True)
    )
    dilation = a.dilation if aligned else (1, 1)
    origin, taps = [], []
    for axis in range(2):
        before = max(a.origin[axis], b.origin[axis])
        last = max(e.dilation[axis] * (e.kernel_size[axis] - 1) - e.origin[axis] for e in (a, b))
        origin.append(before)
        taps.append((last + before) // dilation[axis] + 1)
    return Extent((taps[0], taps[1]), (origin[0], origin[1]), dilation)
