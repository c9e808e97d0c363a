"""How much of the small convolutions' output is used: the paper's coverage analysis of edges."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sw_transplant.geometry import Size
from sw_transplant.layers.placed_tiles import PlacedTiles
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d


class Utilisation(NamedTuple):
    """Shares from 0 to 1 of the convolutions' outputs.

    Attributes:
        total: used by at least one branch.
        branches: used by each branch, in the order of ``module.branches``, without those that pass the map on.
    """

    total: float
    branches: tuple[float, ...]


@torch.no_grad()
def utilisation(module: ShiftwiseConv2d, map_size: int | Size) -> Utilisation:
    """The share of the small convolutions' outputs that reach an output of the module (paper, multi-edge fusion).

    Off a map that is smaller than the kernel, shifts move most of a tile's responses: of those of the published network
    a strip with one edge uses 29% on 14 x 14 maps and 46% on 7 x 7 maps. Four edges with orders of their own use 95%
    and more, all branches taken together.

    Counted are the responses whose filter is centred on the map, H x W for each tile; what padding adds around them is
    not. Filters that are masked in all paths have no output. All edges count alike, whatever their gain.

    Args:
        module: the paper's module, or any other converted layer.
        map_size: of the input, ``(H, W)`` or one number for both.

    Returns:
        The shares, in total and by branch.

    Raises:
        ValueError: a map that gives no output.
    """
    size = (map_size, map_size) if isinstance(map_size, int) else map_size
    out = module.out_size(size)
    if min(*size, *out) < 1:
        raise ValueError(f"utilisation: a map {size} gives an output {out}, expected at least one position")
    branches: list[PlacedTiles] = [branch for branch in module.parts() if not branch.is_identity]
    banks: list[tuple[Tensor, Tensor]] = []  # each bank with what any branch uses of it
    shares = []
    live = getattr(module, "live", None)
    for branch in branches:
        used = _used(branch, size, out, module.stride)
        shares.append(_share(used, live))
        for bank, seen in banks:
            if bank is branch.bank:
                seen |= used
                break
        else:
            banks.append((branch.bank, used))
    counts = [seen.numel() for _, seen in banks]
    parts = [_share(seen, live) * count for (_, seen), count in zip(banks, counts, strict=True)]
    return Utilisation(sum(parts) / max(sum(counts), 1), tuple(shares))


def _share(used: Tensor, live: Tensor | None) -> float:
    """Mean over the responses of the tiles that are in use."""
    kept = used if live is None else used[live.to(used.device)]
    return kept.float().mean().item() if kept.numel() else 0.0


def _used(branch: PlacedTiles, size: Size, out: Size, stride: Size) -> Tensor:
    """Which responses ``(C, T, H, W)`` centred on the map some placement moves to an output; bool, on the CPU."""
    channels, tiles, n, _ = branch.bank.shape
    top, _, left, _ = branch.geometry.resolve(size, stride)
    table = branch.placements.cpu().long()
    which, dy, dx = table.expand(channels, -1, -1).unbind(-1)  # each (C, P)
    reached = []
    for axis, (offset, before) in enumerate(((dy, top), (dx, left))):
        first = branch.geometry.dilation[axis] * (offset + n // 2) - before  # the centre that output 0 reads
        steps = torch.arange(size[axis]) - first[..., None]  # (C, P, H or W)
        reached.append((steps >= 0) & (steps < stride[axis] * out[axis]) & (steps % stride[axis] == 0))
    used = torch.zeros(channels, tiles, *size, dtype=torch.bool)
    channel = torch.arange(channels)
    for p in range(which.shape[1]):
        present = (which[:, p] >= 0) & (which[:, p] < tiles)
        area = reached[0][:, p, :, None] & reached[1][:, p, None, :] & present[:, None, None]
        used[channel, which[:, p].clamp(0, tiles - 1)] |= area
    return used
