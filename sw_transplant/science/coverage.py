"""Utilisation as the authors' program counts it, tile by tile, and as a picture.

It looks at one channel, on the grid of the padded convolution, (H + 2 (N - 1)) x (W + 2 (N - 1)) responses per tile,
and takes the union of what the strips of all edges and the identity read. :mod:`sw_transplant.science.utilisation` is
ours: the responses that are centred on the map and reach an output, over all channels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sw_transplant.geometry import Size
from sw_transplant.layers.sw_conv2d import SWConv2d


def coverage(module: SWConv2d, map_size: int | Size, *, channel: int = 0, slip: bool = True) -> Tensor:
    """How often each response of one channel is read, on the padded grid.

    Args:
        module: the paper's module, of stride 1.
        map_size: of the input, ``(H, W)`` or one number for both.
        channel: the active channel that is looked at.
        slip: count as the program does: where a tile is shifted off the map, an end before the map's begin is taken as
            one that is counted from the far side, which marks responses that nothing reads. False: without that. Either
            way the strips take one row more than there are outputs, as in the program.

    Returns:
        int64 ``(T, H + 2 (N - 1), W + 2 (N - 1))`` on the CPU.

    Raises:
        ValueError: another stride, a merged module, or no such channel.
    """
    if module.stride != (1, 1) or module.merged:
        raise ValueError(f"coverage: stride {module.stride}, merged: {module.merged}; expected stride 1 and no merging")
    if not 0 <= channel < len(module.active):
        raise ValueError(f"coverage: channel {channel}, expected one of the {len(module.active)} active ones")
    height, width = (map_size, map_size) if isinstance(map_size, int) else map_size
    n, tiles = module.tile, module.tiles
    padding = n - 1
    across = padding - n // 2  # where the rows of a horizontal strip begin
    counts = torch.zeros(tiles, height + 2 * padding, width + 2 * padding, dtype=torch.int64, device="cpu")
    horizontal, vertical = (order[:, channel].cpu().tolist() for order in (module.horizontal, module.vertical))
    for edge in range(module.edges):
        for tile in range(tiles):
            along = _read(module.length, n, horizontal[edge][tile], width, slip)
            counts[tile, across : height + 2 * padding - 2 * across, along] += 1
            along = _read(module.length, n, vertical[edge][tile], height, slip)
            counts[tile, along, across : width + 2 * padding - 2 * across] += 1
        taken = int(module.identity[edge, channel])
        counts[taken, padding : padding + height, padding : padding + width] += 1  # as the program has it
    return counts


def published_utilisation(module: SWConv2d, map_size: int | Size, *, channel: int = 0, slip: bool = True) -> float:
    """The share of one channel's responses that any strip or the identity reads, as the authors' program counts it.

    Of a module with a single channel, as in the program, it is 0.60 and 0.51 with one edge in order, and 0.93 and 0.91
    with four random edges, for the third and the fourth stage (strips of 47 on 14 x 14 maps, of 13 on 7 x 7); without
    the slip 0.39 and 0.87 for the third. The paper speaks of 35% and nearly 100%.

    Args:
        module, map_size, channel, slip: as of :func:`coverage`.
    """
    return (coverage(module, map_size, channel=channel, slip=slip) > 0).double().mean().item()


def coverage_picture(counts: Tensor, scale: int = 4) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """One square per tile, side by side in rows: dark where responses are never read, brighter the more often.

    Args:
        counts: of :func:`coverage`.
        scale: pixels for each response.

    Returns:
        uint8 (rows, columns), for instance for ``PIL.Image.fromarray``.
    """
    tiles, height, width = counts.shape
    columns = math.ceil(math.sqrt(tiles))
    sheet = np.full((math.ceil(tiles / columns) * (height + 1) + 1, columns * (width + 1) + 1), 255, dtype=np.uint8)
    grey = (counts.double() / max(int(counts.max()), 1) * 205 + 25 * (counts > 0)).numpy().astype(np.uint8)
    for tile in range(tiles):
        top, left = (tile // columns) * (height + 1) + 1, (tile % columns) * (width + 1) + 1
        sheet[top : top + height, left : left + width] = grey[tile]
    return sheet.repeat(scale, 0).repeat(scale, 1)


def _read(length: int, n: int, place: int, size: int, slip: bool) -> slice:
    """The responses along a strip that a tile at this place gives to the outputs 0 to size - 1."""
    shift = length // 2 - place * n - (n - 1)
    begin, end = max(-shift, 0), max(-shift, 0) + size - max(shift, 0)
    return slice(begin, end) if slip else slice(begin, max(end, begin))
