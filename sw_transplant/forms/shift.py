"""Form "shift", the paper's operator: small convolutions whose responses are shifted and added."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sw_transplant.forms.placed import Biases, Call, Outputs, Placed
from sw_transplant.geometry import Size
from sw_transplant.ops import shift_add
from sw_transplant.ops.depthwise import depthwise_conv2d


class _TileGroup(NamedTuple):
    weight: Tensor  # (C_out * T, 1, n, n): all tiles of one side and one dilation
    tiles: int  # T
    table: Tensor  # (K, G, P, 3) int32, offsets into the responses
    outputs: list[int]  # which output entry k of the table adds to
    scales: list[Tensor | None]  # what entry k of the table is multiplied with before that
    dilation: Size


def prepare_shift(outputs: Outputs, call: Call) -> list[_TileGroup]:
    """Groups banks of equal tile and dilation, so that one convolution and one shift serve all their branches.

    A bank that several branches place is convolved once. Branches of one output share an entry of the shift unless
    their scales differ. Tiles that are not in use leave the convolution, as many as the fullest channel can spare, and
    all of them leave the shift.
    """
    members: dict[tuple[int, Size], list[tuple[int, Placed]]] = {}
    for k, branches in enumerate(outputs):
        for branch in branches:
            members.setdefault((branch.bank.shape[2], branch.extent.dilation), []).append((k, branch))
    groups = []
    for (tile, dilation), placed in members.items():
        banks: list[Placed] = []
        entries: list[tuple[int, Tensor | None, list[Tensor]]] = []
        for k, branch in placed:
            if not any(other.bank is branch.bank for other in banks):
                banks.append(branch)
            which = next(i for i, other in enumerate(banks) if other.bank is branch.bank)
            offsets = _response_offsets(branch, sum(_tile_count(other) for other in banks[:which]))
            for entry, scale, tables in entries:
                if entry == k and scale is branch.scale:
                    tables.append(offsets)
                    break
            else:
                entries.append((k, branch.scale, [offsets]))
        weight = torch.cat([branch.live_bank for branch in banks], dim=1).to(call.dtype).reshape(-1, 1, tile, tile)
        table = _stack_tables([tables for _, _, tables in entries])
        tiles = sum(_tile_count(branch) for branch in banks)
        ks, scales = [k for k, _, _ in entries], [scale for _, scale, _ in entries]
        groups.append(_TileGroup(weight, tiles, table, ks, scales, dilation))
    return groups


def _tile_count(branch: Placed) -> int:
    return branch.bank.shape[1] if branch.live is None else branch.live.order.shape[1]


def _response_offsets(branch: Placed, first: int) -> Tensor:
    """Placements of the kernel -> rows (tile, y, x): output (h, w) reads response (stride * h + y, stride * w + x).

    The responses exist wherever a tile touches the map (full padding, dilation * (n - 1)): docs/design/equivalence.md.
    """
    n = branch.bank.shape[2]
    (dh, dw), (top, left) = branch.extent.dilation, branch.extent.origin
    placements = branch.placements
    if branch.live is not None:
        placements = placements.expand(len(branch.live.position), -1, -1)
    tile, dy, dx = placements.unbind(-1)
    if branch.live is not None:
        tile = torch.where(tile < 0, -1, branch.live.position.gather(1, tile.clamp(min=0).long()))
    y = dh * (dy + n - 1) - top
    x = dw * (dx + n - 1) - left
    return torch.stack([torch.where(tile < 0, -1, tile + first), y, x], dim=-1).to(torch.int32)  # (G, P, 3)


def _stack_tables(tables: list[list[Tensor]]) -> Tensor:
    """Per output a list of (G, P_i, 3) -> (K, G, P, 3), filled up with absent rows (tile -1)."""
    channels = max(table.shape[0] for parts in tables for table in parts)
    joined = [torch.cat([table.expand(channels, -1, -1) for table in parts], dim=1) for parts in tables]
    rows = max(table.shape[1] for table in joined)
    return torch.stack([F.pad(table, (0, 0, 0, rows - table.shape[1]), value=-1) for table in joined])


def execute_shift(x: Tensor, plan: list[_TileGroup], biases: Biases, call: Call) -> list[Tensor]:
    """Small depthwise convolutions with full padding, then shift and add. Memory: T times the input."""
    results: dict[int, Tensor] = {}
    for group in plan:
        n, (dh, dw) = group.weight.shape[2], group.dilation
        z = depthwise_conv2d(x, group.weight, None, (1, 1), (dh * (n - 1), dw * (n - 1)), group.dilation)
        z = z.unflatten(1, (-1, group.tiles))  # (B, C_out, T, Hz, Wz)
        shifted = shift_add(z, group.table, call.out_size, call.stride)
        for entry, (k, scale) in enumerate(zip(group.outputs, group.scales, strict=True)):
            y = shifted[entry]  # and not unbind(): what that gives must not be written to in place
            if scale is not None:
                y = y * scale.to(y.dtype)[:, None, None]
            results[k] = results[k] + y if k in results else y
    return [
        y if bias is None else y + bias[:, None, None]
        for bias, (_, y) in zip(biases, sorted(results.items()), strict=True)
    ]
