"""The bank that the branches of the paper's module share: parallel paths, their masks, and the views that place it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sw_transplant.forms import LiveTiles, Placed
from sw_transplant.geometry import BranchGeometry, Size
from sw_transplant.layers.folding import batch_norm_affine
from sw_transplant.layers.masks import MaskedTiles
from sw_transplant.layers.placed_tiles import PlacedTiles


class TilePath(MaskedTiles, nn.Module):
    """One path: the weight of a convolution from C channels to T filters of each, and which filters are in use.

    Attributes:
        weight: ``(C * T, 1, n, n)``, filter c * T + t is tile t of channel c; at the start of deviation 0.02.
        mask: bool buffer ``(C, T)``, or None for all. A filter that is masked contributes nothing and gets no gradient;
            its weight stays as it is. Write to it in place, or use :meth:`set_mask`.
    """

    weight: nn.Parameter
    mask: Tensor | None

    def __init__(
        self,
        channels: int,
        tiles: int,
        tile: int,
        *,
        masked: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.tiles = channels, tiles
        self.weight = nn.Parameter(torch.empty(channels * tiles, 1, tile, tile, device=device, dtype=dtype))
        mask = torch.ones(channels, tiles, dtype=torch.bool, device=self.weight.device) if masked else None
        self.register_buffer("mask", mask)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the filters from the global generator, as any layer does; takes every filter into use."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.mask is not None:
            self.mask.fill_(True)

    @property
    def bank(self) -> Tensor:
        """The filters ``(C, T, n, n)``, zeros where they are masked."""
        bank = self.weight.view(self.channels, self.tiles, *self.weight.shape[2:])
        return self.masked(bank)

    @property
    def tile_count(self) -> tuple[int, int]:
        return self.channels, self.tiles

    def extra_repr(self) -> str:
        used = "" if self.mask is None else f", {int(self.mask.sum())} in use"
        return f"{self.channels} x {self.tiles} filters {self.weight.shape[2]}x{self.weight.shape[3]}{used}"


class BranchView(PlacedTiles):
    """A branch whose tensors belong to the module: made anew for each call, so that a part may be exchanged."""

    def __init__(
        self,
        geometry: BranchGeometry,
        bank: Tensor,
        placements: Tensor,
        index: Tensor,
        bn: nn.Module | None,
        gain: Tensor | None,
        is_identity: bool = False,
        live: LiveTiles | None = None,
    ) -> None:
        self.geometry, self.placements, self.bn, self.gain = geometry, placements, bn, gain
        self._index = index
        self.bias = None
        self.bank = bank
        self._is_identity = is_identity
        self._live = live

    @property
    def index(self) -> Tensor:
        return self._index

    @property
    def is_identity(self) -> bool:
        return self._is_identity

    def placed(self, origin: Size, *, fold: bool, dense: bool = False) -> list[Placed]:
        """The branch as tensors; the BatchNorm's scale stays beside the bank, which other branches place too."""
        scale = batch_norm_affine(self.bn)[0] if fold and self.bn is not None else None
        return self._place(self.bank, origin, scale, self._live, scaled=scale is not None)
