"""The laid-out equivalence: a large depthwise kernel is tiles at placements, bit for bit.

Pure tensor mathematics. A kernel of kh x kw taps splits into ceil(kh/n) x ceil(kw/n) square tiles of side n, filled
with zeros where n does not divide the kernel, placed n apart. Putting the tiles back at their placements gives the
kernel again. (Paper, section "Method", key design 1: an M x N strip equals ceil(M/N) small filters with offsets.)
docs/design/equivalence.md has the index formula and an example.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_AUTO_TILE = 5
"""Largest side that :func:`choose_tile` picks: the short side of SLaK's strips, the paper's first laid-out tile."""


def choose_tile(kernel_size: tuple[int, int]) -> int:
    """The tile side for a kernel when none is asked for.

    At most 5 and at most the kernel's shorter side (the paper's rule for strips); among these the one that needs the
    fewest tiles, and of equals the smallest, which fills the fewest taps with zeros.

    Args:
        kernel_size: taps ``(kh, kw)``.

    Returns:
        The side n of the square tiles.
    """
    kh, kw = kernel_size
    sides = range(1, min(MAX_AUTO_TILE, kh, kw) + 1)
    return min(sides, key=lambda n: (-(-kh // n) * -(-kw // n), n))


def lay_out(kernel: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Splits a depthwise kernel into tiles and the placements that put them back. Exact: only copies and zeros.

    Args:
        kernel: weights of a depthwise convolution, ``(C_out, 1, kh, kw)``, any floating dtype.
        tile: side n of the square tiles, at least 1.

    Returns:
        bank: ``(C_out, T, n, n)`` with T = ceil(kh/n) * ceil(kw/n), dtype and device of the kernel.
        placements: ``(T, 3)`` int32, rows ``(tile, dy, dx)``: where in the kernel the tile's first tap lies.

    Raises:
        ValueError: the kernel is not that of a depthwise convolution, or the tile is smaller than 1.
    """
    if kernel.dim() != 4 or kernel.shape[1] != 1:
        raise ValueError(f"lay_out: kernel of shape {tuple(kernel.shape)}, expected (C_out, 1, kh, kw)")
    if tile < 1:
        raise ValueError(f"lay_out: tile {tile}, expected at least 1")
    channels, _, kh, kw = kernel.shape
    down, across = -(-kh // tile), -(-kw // tile)
    filled = F.pad(kernel[:, 0], (0, across * tile - kw, 0, down * tile - kh))
    bank = filled.reshape(channels, down, tile, across, tile).permute(0, 1, 3, 2, 4)  # (C, down, across, n, n)
    bank = bank.reshape(channels, down * across, tile, tile).contiguous()
    return bank, grid_placements((kh, kw), tile).to(kernel.device)


def undo_lay_out(bank: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """The kernel that a bank of :func:`lay_out` was made of: tiles side by side, without what lies beyond the kernel.

    What :func:`assemble` gives for the placements of :func:`grid_placements`; that one takes any placements.

    Args:
        bank: ``(C_out, T, n, n)``.
        kernel_size: ``(kh, kw)``, of T = ceil(kh/n) * ceil(kw/n) tiles.

    Returns:
        ``(C_out, 1, kh, kw)``, contiguous. Differentiable.

    Raises:
        ValueError: another number of tiles.
    """
    channels, tiles, n, _ = bank.shape
    (kh, kw), (down, across) = kernel_size, (-(-kernel_size[0] // n), -(-kernel_size[1] // n))
    if tiles != down * across:
        raise ValueError(f"undo_lay_out: {tiles} tiles of side {n}, expected {down * across} for a kernel {kh}x{kw}")
    rows = bank.reshape(channels, down, across, n, n).transpose(2, 3)  # (C, down, n, across, n)
    return rows.reshape(channels, 1, down * n, across * n)[:, :, :kh, :kw].contiguous()


def grid_placements(kernel_size: tuple[int, int], tile: int) -> Tensor:
    """The placements that :func:`lay_out` uses: tiles side by side, row by row.

    Returns:
        ``(T, 3)`` int32 on the CPU, rows ``(tile, dy, dx)``.
    """
    down, across = -(-kernel_size[0] // tile), -(-kernel_size[1] // tile)
    rows = [(i * across + j, i * tile, j * tile) for i in range(down) for j in range(across)]
    return torch.tensor(rows, dtype=torch.int32, device="cpu")


def assembly_index(placements: Tensor, tiles: int, tile: int, kernel_size: tuple[int, int]) -> Tensor:
    """Which taps of a bank add up to each tap of the assembled kernel: a gather, so that its backward is deterministic.

    Args:
        placements: ``(P, 3)``, or ``(C, P, 3)`` where every channel has its own; rows ``(tile, dy, dx)``, tile -1 for
            an absent row.
        tiles: number T of tiles in the bank.
        tile: side n of the tiles.
        kernel_size: taps ``(kh, kw)`` of the kernel. What a tile holds beyond it is left out.

    Returns:
        int64 ``(G, Q, kh * kw)``, G = 1 or C; Q is the largest number of taps that meet in one place. Entries index the
        T * n * n taps of a channel; the entry T * n * n stands for "none".
    """
    kh, kw = kernel_size
    table = placements.detach().cpu().long().reshape(-1, *placements.shape[-2:])  # (G, P, 3)
    groups, rows, _ = table.shape
    none = tiles * tile * tile
    host = table.device  # and not the default device, which may be another one
    steps = torch.arange(tile, device=host)
    which, dy, dx = table.unbind(-1)
    y = (dy[..., None] + steps)[..., :, None].expand(groups, rows, tile, tile)
    x = (dx[..., None] + steps)[..., None, :].expand(groups, rows, tile, tile)
    source = which[..., None, None] * tile * tile + steps[:, None] * tile + steps  # (G, P, n, n)
    exists = ((which >= 0) & (which < tiles))[..., None, None]
    inside = exists & (y >= 0) & (y < kh) & (x >= 0) & (x < kw)
    target = torch.where(inside, y * kw + x, kh * kw).reshape(groups, -1)  # (G, P * n * n)
    source = source.reshape(groups, -1)

    # Taps that meet in one place get ranks 0, 1, ... in the order of the placements: a stable sort by place.
    order = target.argsort(dim=1, stable=True)
    target, source = target.gather(1, order), source.gather(1, order)
    place = torch.arange(target.shape[1], device=host).expand_as(target)
    first = torch.searchsorted(target.contiguous(), target.contiguous())
    rank = place - first
    valid = target < kh * kw
    depth = int(rank[valid].max()) + 1 if bool(valid.any()) else 1
    index = torch.full((groups, depth, kh * kw), none, dtype=torch.int64, device=host)
    group = torch.arange(groups, device=host)[:, None].expand_as(target)
    index[group[valid], rank[valid], target[valid]] = source[valid]
    return index.to(placements.device)


def gather_kernel(bank: Tensor, index: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Assembles a kernel from a bank with an index of :func:`assembly_index`. Differentiable.

    Args:
        bank: ``(C, T, n, n)``.
        index: ``(G, Q, kh * kw)``, G = 1 or C, on the bank's device.
        kernel_size: ``(kh, kw)``.

    Returns:
        ``(C, 1, kh, kw)``, dtype of the bank. With Q = 1 a pure copy.
    """
    flat = F.pad(bank.flatten(1), (0, 1))  # (C, T * n * n + 1): the last one is the zero that "none" reads
    if index.shape[0] == 1:
        taps = flat[:, index[0]]
    else:
        channel = torch.arange(bank.shape[0], device=bank.device)[:, None, None]
        taps = flat[channel, index]  # indexing, not gather(): its CUDA backward sorts instead of adding atomically
    kernel = taps[:, 0] if taps.shape[1] == 1 else taps.sum(1)
    return kernel.reshape(-1, 1, *kernel_size)


class Inverse(NamedTuple):
    """Where in the kernel each tap of a bank goes.

    Attributes:
        places: int64 ``(T * n * n,)``; the entry kh * kw stands for "nowhere".
        gaps: whether the kernel has taps that no tile fills, and whether tiles have taps that go nowhere.
    """

    places: Tensor
    gaps: tuple[bool, bool]


def inverse_index(index: Tensor, taps: int) -> Inverse | None:
    """The inverse of an assembly index; None where a tap goes to several places, or several meet in one.

    Args:
        index: ``(G, Q, kh * kw)`` of :func:`assembly_index`, on the CPU.
        taps: T * n * n of the bank.
    """
    if index.shape[:2] != (1, 1):
        return None
    sources, places = index[0, 0], index.shape[2]
    used = sources < taps
    inverse = torch.full((taps,), places, dtype=torch.int64, device=index.device)
    inverse[sources[used]] = torch.arange(places, device=index.device)[used]
    found, wanted = int((inverse < places).sum()), int(used.sum())
    return Inverse(inverse, (wanted < places, found < taps)) if found == wanted else None


def regather_kernel(bank: Tensor, index: Tensor, inverse: Inverse, kernel_size: tuple[int, int]) -> Tensor:
    """What :func:`gather_kernel` gives, where there is an inverse: then the gradient is a gather, too, and as quick.

    Args:
        bank, index, kernel_size: as there.
        inverse: of the index, on the bank's device.
    """
    shape = (bank.shape[0], 1, *kernel_size)
    return _Regather.apply(bank, index[0, 0], inverse.places, inverse.gaps, shape)  # type: ignore[no-any-return]


class _Regather(torch.autograd.Function):
    """The taps of every channel at other places; the two indices are each other's inverse, and "none" reads a zero."""

    @staticmethod
    def forward(
        ctx: Any, taps: Tensor, index: Tensor, inverse: Tensor, gaps: tuple[bool, bool], shape: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(index, inverse)
        ctx.shape, ctx.gaps = taps.shape, gaps
        return _read(taps, index, gaps[0], shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        index, inverse = ctx.saved_tensors
        if grad.requires_grad:
            given = _Regather.apply(grad, inverse, index, ctx.gaps[::-1], ctx.shape)
        else:
            given = _read(grad, inverse, ctx.gaps[1], ctx.shape)
        return given, None, None, None, None


def _read(taps: Tensor, index: Tensor, gaps: bool, shape: tuple[int, ...]) -> Tensor:
    flat = F.pad(taps.flatten(1), (0, 1)) if gaps else taps.flatten(1)
    return flat.index_select(1, index).view(shape)


def assemble(bank: Tensor, placements: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Puts the tiles of a bank at their placements: the inverse of :func:`lay_out`. Tiles that overlap add up.

    Args:
        bank: ``(C, T, n, n)``.
        placements: ``(P, 3)`` or ``(C, P, 3)``, rows ``(tile, dy, dx)``; tile -1 marks an absent row.
        kernel_size: ``(kh, kw)``; taps that a tile holds beyond the kernel are left out.

    Returns:
        ``(C, 1, kh, kw)``. ``assemble(*lay_out(k, n), k.shape[2:])`` equals k bit for bit.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if bank.dim() != 4 or bank.shape[2] != bank.shape[3]:
        raise ValueError(f"assemble: bank of shape {tuple(bank.shape)}, expected (C, T, n, n)")
    if placements.dim() not in (2, 3) or placements.shape[-1] != 3:
        raise ValueError(f"assemble: placements of shape {tuple(placements.shape)}, expected (P, 3) or (C, P, 3)")
    if placements.dim() == 3 and placements.shape[0] not in (1, bank.shape[0]):
        raise ValueError(
            f"assemble: placements for {placements.shape[0]} channels, expected 1 or the bank's {bank.shape[0]}"
        )
    index = assembly_index(placements, bank.shape[1], bank.shape[2], kernel_size)
    return gather_kernel(bank, index.to(bank.device), kernel_size)


def support(placements: Tensor, tiles: int, tile: int, kernel_size: tuple[int, int]) -> Tensor:
    """The taps of a bank that lie inside the kernel; the others are filling.

    Args:
        placements: ``(P, 3)`` or ``(G, P, 3)``.
        tiles, tile, kernel_size: as in :func:`assembly_index`.

    Returns:
        bool ``(G, T, n, n)``: True where at least one placement puts the tap inside the kernel.
    """
    index = assembly_index(placements, tiles, tile, kernel_size).flatten(1)  # (G, Q * kh * kw)
    used = torch.zeros(index.shape[0], tiles * tile * tile + 1, dtype=torch.bool, device=index.device)
    used.scatter_(1, index, True)
    return used[:, :-1].reshape(-1, tiles, tile, tile)
