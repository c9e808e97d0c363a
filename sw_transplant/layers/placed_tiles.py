"""What a branch is to the forms, whoever holds its tensors: tiles, where they go, and what follows the shift."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sw_transplant.equivalence import Inverse
from sw_transplant.forms import LiveTiles, Placed
from sw_transplant.geometry import BranchGeometry, Extent, Size
from sw_transplant.layers.folding import batch_norm_affine, keeps_statistics


class PlacedTiles:
    """What every branch is to the forms: where its tiles go, and what follows the shift.

    Attributes:
        geometry: the kernel that the tiles make.
        bank: ``(C_out, T, n, n)``.
        placements: ``(G, P, 3)`` int32, G = 1 or C_out; with a gain, edge e has the e-th of E equal shares of the rows.
        index: the assembly index of each edge that has a gain of its own, :func:`edge_indices`; else of all rows.
        bias: ``(C_out,)`` added before the BatchNorm, or None.
        bn: a BatchNorm over C_out channels, or None.
        gain: ``(E,)`` or ``(E, C_out)``, what each edge is multiplied with, or None.
    """

    geometry: BranchGeometry
    bank: Tensor
    placements: Tensor
    bias: Tensor | None
    bn: nn.Module | None
    gain: Tensor | None

    @property
    def rows(self) -> Tensor:
        """The placements, on the device of the bank."""
        return self.placements

    @property
    def index(self) -> Tensor:
        """The assembly index, on the device of the bank."""
        raise NotImplementedError

    @property
    def is_identity(self) -> bool:
        """Whether the branch passes the map on as it is."""
        raise NotImplementedError

    @property
    def folds(self) -> bool:
        """Whether the branch is linear as it stands: no BatchNorm, or one that uses its running statistics."""
        return self.bn is None or (not self.bn.training and keeps_statistics(self.bn))

    def placed(self, origin: Size, *, fold: bool, dense: bool = False) -> list[Placed]:
        """The branch as tensors, to be added up.

        ``fold`` multiplies the BatchNorm's scale in, in float32 at least; ``dense`` promises that nothing but dense
        kernels is made of it, which do not read what tiles hold beyond the kernel.
        """
        raise NotImplementedError

    def _place(
        self,
        bank: Tensor,
        origin: Size,
        scale: Tensor | None,
        live: LiveTiles | None,
        *,
        scaled: bool,
        inverse: Inverse | None = None,
    ) -> list[Placed]:
        """One entry, or with a gain one for each edge; all hold the same bank. ``scaled``: a BatchNorm is folded in."""
        extent = Extent(self.geometry.kernel_size, origin, self.geometry.dilation)
        if self.gain is None:
            identity = self.is_identity and not scaled
            return [Placed(bank, self.rows, self.index[0], extent, scale, live, identity, inverse)]
        gains = [gain.reshape(-1) for gain in self.gain]
        rows = self.rows.chunk(len(gains), dim=1)
        return [
            Placed(bank, table, index, extent, _product(scale, gain), live, self.is_identity and not scaled)
            for table, index, gain in zip(rows, self.index, gains, strict=True)
        ]

    @property
    def trains_kernel(self) -> bool:
        """Whether the kernel gets a gradient as it runs: of the bank, of a gain, or of a BatchNorm that is folded."""
        if self.bank.requires_grad or (self.gain is not None and self.gain.requires_grad):
            return True
        return self.bn is not None and self.folds and _requires_grad(self.bn.weight)

    @property
    def trained(self) -> tuple[bool, bool]:
        """Whether anything that the kernel is made of, BatchNorm folded, requires gradients, and that of the bias."""
        norm, offset = (False, False) if self.bn is None else map(_requires_grad, (self.bn.weight, self.bn.bias))
        bank, gain, bias = map(_requires_grad, (self.bank, self.gain, self.bias))
        return bank or gain or norm, bias or norm or offset

    def reason_against_setting(self) -> str | None:
        """Why the branch cannot be made any given kernel; None where it can."""
        return "its tiles are shared, and placed by several edges"

    def folded_bias(self) -> Tensor | None:
        """What the branch adds to every position, ``(C_out,)``: its bias through its BatchNorm; None for nothing."""
        if self.bn is None:
            return self.bias
        scale, offset = batch_norm_affine(self.bn)
        return offset if self.bias is None else offset + self.bias.to(scale.dtype) * scale


def _requires_grad(tensor: Any) -> bool:
    return tensor is not None and tensor.requires_grad


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a * b
