"""What a Shiftwise layer looks like from outside: the attributes of an nn.Conv2d, and the plain kernels it equals."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from torch import Tensor

from sw_transplant.forms import DenseKernel, add_kernels, dense_kernel, join_kernels
from sw_transplant.geometry import BranchGeometry, Extent, Padding, Size, enclose
from sw_transplant.layers.branch import PlacedTiles, total


class AsConv2d:
    """Mixin of the layers that are a sum of branches: everything here follows from the branches, the stride aside."""

    branches: Any
    stride: Size
    padding_mode = "zeros"
    transposed = False
    output_padding = (0, 0)

    def parts(self) -> Sequence[PlacedTiles]:
        """The branches, as what they are to the forms."""
        return list(self.branches)

    @property
    def _like(self) -> Tensor:
        """A tensor of the dtype and on the device of the module."""
        return self.branches[0].bank  # type: ignore[return-value]

    @property
    def _geometry(self) -> BranchGeometry:
        """That of the first branch: what it makes of a map's size, all branches make."""
        return self.branches[0].geometry  # type: ignore[return-value]

    @property
    def extent(self) -> Extent:
        """The one kernel that has every tap of every branch."""
        return reduce(enclose, [self.extent_on(branch, (1, 1)) for branch in self.parts()])

    def extent_on(self, branch: PlacedTiles, size: Size) -> Extent:
        """Where the kernel of one of the branches lies over a map of this size."""
        top, _, left, _ = branch.geometry.resolve(size, self.stride)
        return Extent(branch.geometry.kernel_size, (top, left), branch.geometry.dilation)

    @property
    def kernel_size(self) -> Size:
        """Taps of the one kernel that equals all branches."""
        return self.extent.kernel_size

    @property
    def dilation(self) -> Size:
        """Dilation of the one kernel that equals all branches."""
        return self.extent.dilation

    @property
    def padding(self) -> Size | Padding:
        """As in nn.Conv2d, ``(vertical, horizontal)`` or ``"same"``; four sides, top to right, where they differ."""
        if self._geometry.padding == "same" and self.stride != (1, 1):
            return "same"
        whole = self.extent
        grown = self.growth
        (top, left), (kh, kw), (dh, dw) = whole.origin, whole.kernel_size, whole.dilation
        bottom, right = grown[0] + dh * (kh - 1) - top, grown[1] + dw * (kw - 1) - left
        return (top, left) if (top, left) == (bottom, right) else (top, bottom, left, right)

    @property
    def growth(self) -> Size:
        """By how much the map grows at stride 1 (:attr:`geometry.BranchGeometry.growth`)."""
        return self._geometry.growth

    @property
    def weight(self) -> Tensor:
        """The one depthwise kernel ``(C_out, 1, kh, kw)`` that equals all branches, BatchNorm folded. Read-only."""
        return reduce(add_kernels, self._dense()).weight

    @property
    def bias(self) -> Tensor | None:
        """The bias ``(C_out,)`` that goes with :attr:`weight`, BatchNorm folded; None for none. Read-only."""
        return total([branch.folded_bias() for branch in self.parts()], self._like.dtype)

    def _dense(self) -> list[DenseKernel]:
        return [
            dense_kernel(placed)
            for branch in self.parts()
            for placed in branch.placed(self.extent_on(branch, (1, 1)).origin, fold=True)
        ]

    def out_size(self, size: Size) -> Size:
        """Size of the output map for an input map ``(H, W)``."""
        return self._geometry.out_size(size, self.stride)

    @property
    def channel_order(self) -> Tensor | None:
        """Which input channel the k-th channel of :meth:`kernels` reads, ``(C_in,)``; None for the k-th itself."""
        return None

    def kernels(self) -> tuple[list[DenseKernel], Tensor | None]:
        """The plain convolutions that this module equals in eval: as few kernels as add no work, and one bias.

        Raises:
            NotImplementedError: a BatchNorm keeps no running statistics, so that there is nothing to fold.
        """
        for i, branch in enumerate(self.parts()):
            if branch.bn is not None and getattr(branch.bn, "running_mean", None) is None:
                raise NotImplementedError(
                    f"ShiftwiseConv2d: the BatchNorm of branch {i} has no running statistics to fold; "
                    "expected track_running_stats=True"
                )
        return join_kernels(self._dense()), self.bias
