"""What the forms work on: banks of tiles and where they go, dense kernels and where they lie, and one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sw_transplant.equivalence import Inverse
from sw_transplant.geometry import Extent, Size


class LiveTiles(NamedTuple):
    """The tiles of a masked bank that are in use, at the front of every channel.

    Attributes:
        order: int64 ``(C, T')``, the tiles of each channel, those in use first; T' is how many the fullest one uses.
        position: int32 ``(C, T)``, where in ``order`` a tile stands; -1 for one that is not in use.
    """

    order: Tensor
    position: Tensor


@dataclass(frozen=True)
class Placed:
    """One linear branch: a bank, where its tiles go, and where the kernel they make lies over the map.

    Attributes:
        bank: ``(C_out, T, n, n)``; taps outside the kernel are zero, unless only dense kernels are made of it.
        placements: ``(G, P, 3)`` int32, rows ``(tile, dy, dx)`` in taps from the kernel's first one.
        index: the assembly index of these placements (:func:`equivalence.assembly_index`).
        extent: taps, padding before the map, dilation.
        scale: ``(C_out,)`` or ``(1,)``, what the branch's output is multiplied with; None for 1. Branches that place
            the same bank (the same tensor object) keep it apart from the bank, so that its responses serve them all.
        live: which tiles are in use, where others can be left out; None for all.
        identity: the branch passes the map on as it is.
        inverse: where each tap of a channel goes (:func:`equivalence.inverse_index`); None where that is not one place.
    """

    bank: Tensor
    placements: Tensor
    index: Tensor
    extent: Extent
    scale: Tensor | None = None
    live: LiveTiles | None = None
    identity: bool = False
    inverse: Inverse | None = None

    @property
    def live_bank(self) -> Tensor:
        """The bank without tiles that no channel has in use: ``(C_out, T', n, n)``."""
        if self.live is None:
            return self.bank
        channel = torch.arange(self.bank.shape[0], device=self.bank.device)[:, None]
        return self.bank[channel, self.live.order]


@dataclass(frozen=True)
class DenseKernel:
    """A depthwise kernel ``(C_out, 1, kh, kw)`` and where it lies."""

    weight: Tensor
    extent: Extent


class Call(NamedTuple):
    """What the forms need to know of one call.

    Attributes:
        in_size, out_size: ``(H, W)`` of the map and of the output.
        stride: of the output.
        dtype: what is multiplied: that of the bank, or what autocast asks for.
    """

    in_size: Size
    out_size: Size
    stride: Size
    dtype: torch.dtype


Outputs = Sequence[Sequence[Placed]]
"""Output k of a form is the sum of the placed branches in entry k."""
Biases = Sequence[Tensor | None]
"""What is added to output k, ``(C_out,)``, or None."""
