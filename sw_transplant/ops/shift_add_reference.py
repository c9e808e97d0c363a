"""Shift-and-add in plain PyTorch: the definition that every kernel must reproduce bit for bit.

Two ways that add the same terms in the same order. Where the table is shared by all channels and lies in host memory,
each placement is one slice of z added to one slice of the result. Otherwise the shifts are known only to the device, or
differ from channel to channel: then each placement is a gather at computed positions, and nothing waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are formed in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shift_add_reference(
    z: Tensor, placements: Tensor, out_size: Sequence[int], stride: Sequence[int] = (1, 1)
) -> Tensor:
    """`sw_transplant.ops.shift_add` in plain PyTorch: same arguments, not validated here, and same result."""
    (batch, channels, tiles, z_height, z_width), (height, width) = z.shape, out_size
    branches, _, rows, _ = placements.shape
    out = z.new_zeros((branches, batch, channels, height, width), dtype=accumulation_dtype(z.dtype))
    if _is_sliceable(placements):
        for k, table in enumerate(placements[:, 0].tolist()):
            for tile, y, x in table:
                rows_out, rows_z = _overlap(height, z_height, y, stride[0])
                cols_out, cols_z = _overlap(width, z_width, x, stride[1])
                if 0 <= tile < tiles:
                    out[k, :, :, rows_out, cols_out] += z[:, :, tile, rows_z, cols_z]
        return out.to(z.dtype)

    flat = z.reshape(batch, channels, tiles * z_height * z_width)
    h = torch.arange(height, device=z.device) * stride[0]
    w = torch.arange(width, device=z.device) * stride[1]
    for k in range(branches):
        for p in range(rows):
            tile, y, x = _columns(placements[k, :, p])  # each (G, 1, 1)
            i, j = h[:, None] + y, w + x
            inside = (0 <= tile) & (tile < tiles) & (0 <= i) & (i < z_height) & (0 <= j) & (j < z_width)
            index = torch.where(inside, (tile * z_height + i) * z_width + j, 0)  # (G, H, W)
            out[k] += _gather(flat, index, inside)
    return out.to(z.dtype)


def shift_add_backward_reference(
    grad: Tensor, placements: Tensor, tiles: int, z_size: Sequence[int], stride: Sequence[int] = (1, 1)
) -> Tensor:
    """The gradient of `shift_add` with respect to z: grad (K, B, C, H, W) -> grad_z (B, C, tiles, *z_size)."""
    (branches, batch, channels, height, width), (z_height, z_width) = grad.shape, z_size
    rows = placements.shape[2]
    out = grad.new_zeros((batch, channels, tiles, z_height, z_width), dtype=accumulation_dtype(grad.dtype))
    if _is_sliceable(placements):
        for k, table in enumerate(placements[:, 0].tolist()):
            for tile, y, x in table:
                rows_out, rows_z = _overlap(height, z_height, y, stride[0])
                cols_out, cols_z = _overlap(width, z_width, x, stride[1])
                if 0 <= tile < tiles:
                    out[:, :, tile, rows_z, cols_z] += grad[k, :, :, rows_out, cols_out]
        return out.to(grad.dtype)
    if tiles == 0:
        return out.to(grad.dtype)

    flat = grad.reshape(branches, batch, channels, height * width)
    maps = out.view(batch, channels, tiles, z_height * z_width)
    i = torch.arange(z_height, device=grad.device)[:, None]
    j = torch.arange(z_width, device=grad.device)
    for k in range(branches):
        for p in range(rows):
            tile, y, x = _columns(placements[k, :, p])  # each (G, 1, 1)
            h, w = (i - y).div(stride[0], rounding_mode="floor"), (j - x).div(stride[1], rounding_mode="floor")
            inside = (0 <= tile) & (tile < tiles) & (0 <= h) & (h < height) & (0 <= w) & (w < width)
            inside &= (h * stride[0] == i - y) & (w * stride[1] == j - x)
            index = torch.where(inside, h * width + w, 0)  # (G, Hz, Wz)
            term = _gather(flat[k], index, inside)
            # Each channel writes to one tile of its own: no element twice, so the result does not depend on any order.
            target = tile.clamp(0, tiles - 1).unsqueeze(0).expand(batch, channels, 1, z_height * z_width)
            maps.scatter_(2, target, maps.gather(2, target) + term.flatten(2).unsqueeze(2))
    return out.to(grad.dtype)


def _is_sliceable(placements: Tensor) -> bool:
    return placements.device.type == "cpu" and placements.shape[1] == 1


def _overlap(size: int, z_size: int, shift: int, stride: int) -> tuple[slice, slice]:
    """Outputs o in [0, size) with stride * o + shift in [0, z_size), and the positions that they read."""
    first = max(0, -(shift // stride))
    last = min(size - 1, (z_size - 1 - shift) // stride)
    if first > last:
        return slice(0, 0), slice(0, 0)
    return slice(first, last + 1), slice(stride * first + shift, stride * last + shift + 1, stride)


def _columns(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows (G, 3) -> tile, y, x as int64, each (G, 1, 1): 64 bits, so that no shift overflows."""
    tile, y, x = rows.to(torch.int64)[:, :, None, None].unbind(1)
    return tile, y, x


def _gather(flat: Tensor, index: Tensor, inside: Tensor) -> Tensor:
    """flat (B, C, N), index and inside (G, H, W) -> (B, C, H, W): the value at each index, zero where not inside."""
    batch, channels, size = flat.shape
    if size == 0:
        return flat.new_zeros((batch, channels, *index.shape[1:]))
    values = flat.gather(2, index.flatten(1).expand(batch, channels, -1)).unflatten(2, index.shape[1:])
    return torch.where(inside, values, 0)
