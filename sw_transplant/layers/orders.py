"""What the paper's module draws at random: the channels that bypass it, and the order of the tiles in every edge.

The published networks seed the global generators in every module, and their checkpoints do not hold what was drawn; the
same numbers come from generators of our own here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sw_transplant.geometry import BranchGeometry
from sw_transplant.layers.branch import edge_indices

BRANCHES = ("horizontal", "vertical", "identity")
PUBLISHED_SEED = 123
"""Seed of the published networks, the same in every module."""


def ghost_channels(channels: int, ghost: float, seed: int = PUBLISHED_SEED, *, even: bool = True) -> list[int]:
    """The channels that bypass the module, drawn from the seed.

    Args:
        channels: C.
        ghost: the fraction that bypasses, 0 to below 1; 0 for none.
        seed: of NumPy's legacy generator, which the published networks use.
        even: the rule of the final networks: ``int(C * (1 - ghost))`` channels stay active, less one where that is odd.
            False: that of the first ones, in SLaK's frame: ``int(C * ghost)`` channels bypass.

    Returns:
        Ascending.
    """
    if not 0 <= ghost < 1:
        raise ValueError(f"ghost {ghost}, expected a fraction from 0 to below 1, or a list of channels")
    count = channels - int(channels * (1 - ghost)) // 2 * 2 if even else int(channels * ghost)
    if not ghost:
        return []
    drawn = np.random.RandomState(seed).choice(channels, count, replace=False)
    return sorted(int(channel) for channel in drawn)


def active_channels(channels: int, ghost: float | Sequence[int], seed: int = PUBLISHED_SEED) -> Tensor:
    """The channels that do not bypass the module.

    Args:
        channels: C.
        ghost: the fraction that bypasses, 0 to below 1; the number of active channels is ``int(C * (1 - ghost))``, less
            one where that is odd. Or the bypassing channels. 0 for none.
        seed: of NumPy's legacy generator, which the published networks use.

    Returns:
        int64 ``(active,)`` on the CPU, ascending.

    Raises:
        ValueError: no channel is left, or a channel that does not exist.
    """
    if isinstance(ghost, float | int):
        bypass = set(ghost_channels(channels, ghost, seed))
    else:
        bypass = set(ghost)
        if not bypass <= set(range(channels)):
            raise ValueError(f"ghost channels {sorted(bypass)}, expected some of 0 to {channels - 1}")
    left = [channel for channel in range(channels) if channel not in bypass]
    if not left:
        raise ValueError(f"ghost {ghost} leaves none of {channels} channels, expected at least one; lower it")
    return torch.tensor(left, dtype=torch.int64, device="cpu")


class Orders(NamedTuple):
    """Places of the tiles ``(E, C, T)``, along rows and columns, and the tiles of the identity ``(E, C)``; int32."""

    horizontal: Tensor
    vertical: Tensor
    identity: Tensor


def draw_orders(channels: int, tiles: int, edges: int, seed: int = PUBLISHED_SEED, *, opposite: bool = False) -> Orders:
    """The orders that the published module draws after ``torch.manual_seed(seed)``; the global generator is left alone.

    In this sequence: for each edge and channel a permutation of the tiles (horizontal), the same again (vertical), then
    for each edge a tile per channel (identity). A tile's place is the inverse of its permutation.

    Args:
        channels: number of active channels.
        tiles, edges: T and E.
        seed: any 64-bit integer.
        opposite: nothing is drawn for the strips: tile t is at place t along rows, at T - 1 - t along columns.

    Returns:
        On the CPU; new tensors at each call.
    """
    horizontal, vertical, identity = _draw(channels, tiles, edges, seed, opposite)
    return Orders(horizontal.clone(), vertical.clone(), identity.clone())


@lru_cache(maxsize=8)
def _draw(channels: int, tiles: int, edges: int, seed: int, opposite: bool) -> Orders:
    """Drawing takes a while, and the modules of one stage draw the same."""
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        strips = []
        for branch in ("horizontal", "vertical"):
            if opposite:
                places = torch.arange(tiles, dtype=torch.int32)
                places = places if branch == "horizontal" else places.flip(0)
                strips.append(places.expand(edges, channels, tiles).clone())
                continue
            drawn = [torch.randperm(tiles, generator=generator) for _ in range(edges * channels)]
            strips.append(torch.stack(drawn).argsort(dim=1).view(edges, channels, tiles).to(torch.int32))
        taken = [torch.randint(0, tiles, [channels], generator=generator) for _ in range(edges)]
        return Orders(strips[0], strips[1], torch.stack(taken).to(torch.int32))


def check_order(what: str, order: Tensor, shape: torch.Size, tiles: int) -> None:
    """Refuses an order of another shape, or with places that are not 0 to T - 1.

    Raises:
        ValueError: it is refused; ``what`` names it.
    """
    if order.shape != shape:
        raise ValueError(f"{what}: shape {tuple(order.shape)}, expected {tuple(shape)}")
    if not 0 <= int(order.min()) <= int(order.max()) < tiles:
        raise ValueError(f"{what}: values {int(order.min())} to {int(order.max())}, expected 0 to {tiles - 1}")


def branch_tables(branch: str, order: Tensor, tiles: int, tile: int, sets: int) -> tuple[Tensor, Tensor]:
    """Where the tiles of one branch go, as the forms read it.

    Args:
        branch: ``"horizontal"``, ``"vertical"`` or ``"identity"``.
        order: as in :class:`Orders`.
        tiles, tile: T and n.
        sets: E for an assembly index per edge, 1 for one of all edges.

    Returns:
        placements ``(C, P, 3)`` int32 and assembly index ``(sets, C, Q, taps)`` int64, on the CPU; read only.
    """
    host = order.detach().cpu().to(torch.int32).contiguous()
    return _tables(branch, host.numpy().tobytes(), tuple(host.shape), tiles, tile, sets)


@lru_cache(maxsize=16)
def _tables(
    branch: str, order: bytes, shape: tuple[int, ...], tiles: int, tile: int, sets: int
) -> tuple[Tensor, Tensor]:
    """Kept: the modules of one stage have the same orders, unless they were trained apart."""
    with torch.device("cpu"):
        drawn = torch.frombuffer(bytearray(order), dtype=torch.int32).view(shape)
        nothing = torch.zeros_like(drawn)
        if branch == "identity":
            rows = torch.stack([drawn, nothing, nothing], dim=-1)[:, :, None]  # (E, C, 1, 3)
            size = (tile, tile)
        else:
            which = torch.arange(tiles, dtype=torch.int32).expand_as(drawn)
            place, across = drawn * tile, branch == "horizontal"
            rows = torch.stack([which, nothing if across else place, place if across else nothing], dim=-1)
            size = (tile, tile * tiles) if across else (tile * tiles, tile)
        placements = rows.transpose(0, 1).flatten(1, 2).contiguous()
        return placements, edge_indices(placements, sets, tiles, tile, size)


def strip_geometries(length: int, n: int) -> tuple[BranchGeometry, ...]:
    """Of the branches: strips that T whole tiles make, centred as one of ``length`` taps; the output keeps the size."""
    filled = -(-length // n) * n
    across, along = (n // 2, n - 1 - n // 2), (length // 2, filled - 1 - length // 2)
    return (
        BranchGeometry((n, filled), (*across, *along)),
        BranchGeometry((filled, n), (*along, *across)),
        BranchGeometry((n, n), (*across, *across)),
    )
