"""The execution forms of a Shiftwise module: exact ways to run the same sum of placed tiles.

A form has two steps. ``prepare`` turns the branches into the tensors that the form multiplies with (a plan, which
depends on parameters only and can be cached in eval); ``execute`` applies a plan to a feature map. To add a form, write
the two steps, enter it in ``FORMS`` and teach :func:`choose_form` when to take it.

    form        prepare                                             execute
    shift       concatenates distinct banks of equal tile, dilation small convolutions, then shift and add (the paper)
    assembled   puts the tiles at their placements: large kernels   depthwise convolution with these kernels
    toeplitz    the same                                            one pass of Toeplitz products on tensor cores
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .equivalence import gather_kernel
from .geometry import Extent, Size, enclose
from .ops import shift_add, toeplitz_conv


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
        bank: ``(C_out, T, n, n)``; taps outside the kernel are zero.
        placements: ``(G, P, 3)`` int32, rows ``(tile, dy, dx)`` in taps from the kernel's first one.
        index: the assembly index of these placements (:func:`equivalence.assembly_index`).
        extent: taps, padding before the map, dilation.
        scale: ``(C_out,)`` or ``(1,)``, what the branch's output is multiplied with; None for 1. Branches that place
            the same bank (the same tensor object) keep it apart from the bank, so that its responses serve them all.
        live: which tiles are in use, where others can be left out; None for all.
    """

    bank: Tensor
    placements: Tensor
    index: Tensor
    extent: Extent
    scale: Tensor | None = None
    live: LiveTiles | None = None

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


class Geometry(NamedTuple):
    """What the forms need to know of one call: size of the output map, and the stride."""

    out_size: Size
    stride: Size


Outputs = Sequence[Sequence[Placed]]
"""Output k of a form is the sum of the placed branches in entry k."""
Biases = Sequence[Tensor | None]
"""What is added to output k, ``(C_out,)``, or None."""


# ---- shift: the paper's operator ------------------------------------------------------------------------------------


class _TileGroup(NamedTuple):
    weight: Tensor  # (C_out * T, 1, n, n): all tiles of one side and one dilation
    tiles: int  # T
    table: Tensor  # (K, G, P, 3) int32, offsets into the responses
    outputs: list[int]  # which output entry k of the table adds to
    scales: list[Tensor | None]  # what entry k of the table is multiplied with before that
    dilation: Size


def prepare_shift(outputs: Outputs) -> list[_TileGroup]:
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
        weight = torch.cat([branch.live_bank for branch in banks], dim=1).reshape(-1, 1, tile, tile)
        table = _stack_tables([tables for _, _, tables in entries])
        tiles = sum(_tile_count(branch) for branch in banks)
        ks, scales = [k for k, _, _ in entries], [scale for _, scale, _ in entries]
        groups.append(_TileGroup(weight, tiles, table, ks, scales, dilation))
    return groups


def _tile_count(branch: Placed) -> int:
    return branch.bank.shape[1] if branch.live is None else branch.live.order.shape[1]


def _response_offsets(branch: Placed, first: int) -> Tensor:
    """Placements of the kernel -> rows (tile, y, x): output (h, w) reads response (stride * h + y, stride * w + x).

    The responses exist wherever a tile touches the map (full padding, dilation * (n - 1)); DESIGN's index formula.
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


def execute_shift(x: Tensor, plan: list[_TileGroup], biases: Biases, geometry: Geometry) -> list[Tensor]:
    """Small depthwise convolutions with full padding, then shift and add. Memory: T times the input."""
    results: dict[int, Tensor] = {}
    for group in plan:
        n, (dh, dw) = group.weight.shape[2], group.dilation
        z = F.conv2d(x, group.weight, None, 1, (dh * (n - 1), dw * (n - 1)), group.dilation, x.shape[1])
        z = z.unflatten(1, (-1, group.tiles))  # (B, C_out, T, Hz, Wz)
        shifted = shift_add(z, group.table, geometry.out_size, geometry.stride)
        for k, scale, y in zip(group.outputs, group.scales, shifted.unbind(0), strict=True):
            if scale is not None:
                y = y * scale.to(y.dtype)[:, None, None]
            results[k] = results[k] + y if k in results else y
    return [
        y if bias is None else y + bias[:, None, None]
        for bias, (_, y) in zip(biases, sorted(results.items()), strict=True)
    ]


# ---- assembled: shift the weights instead ---------------------------------------------------------------------------


def prepare_assembled(outputs: Outputs) -> list[list[DenseKernel]]:
    """Per output the large kernels, as few as possible without adding work (see :func:`join_kernels`)."""
    return [join_kernels([dense_kernel(branch) for branch in branches]) for branches in outputs]


def dense_kernel(branch: Placed) -> DenseKernel:
    """The kernel that a placed branch makes; its scale is multiplied in float32 at least."""
    weight = gather_kernel(branch.bank, branch.index, branch.extent.kernel_size)
    if branch.scale is not None:
        weight = (weight * branch.scale[:, None, None, None]).to(weight.dtype)
    return DenseKernel(weight, branch.extent)


def join_kernels(kernels: Sequence[DenseKernel]) -> list[DenseKernel]:
    """Adds kernels up into one wherever the sum has no more taps than its parts.

    A 5 x 5 vanishes in a 51 x 5, and dilated kernels in the square that they lie in. A 51 x 5 and a 5 x 51 stay two:
    their sum would be a 51 x 51 with five times the work.
    """
    joined: list[DenseKernel] = []
    for kernel in sorted(kernels, key=lambda k: -k.extent.taps):
        for i, other in enumerate(joined):
            if enclose(other.extent, kernel.extent).taps <= other.extent.taps + kernel.extent.taps:
                joined[i] = add_kernels(other, kernel)
                break
        else:
            joined.append(kernel)
    return joined


def add_kernels(a: DenseKernel, b: DenseKernel) -> DenseKernel:
    """The one kernel whose response is the sum of both. Exact but for the rounding of taps that meet."""
    outer = enclose(a.extent, b.extent)
    return DenseKernel(embed(a, outer) + embed(b, outer), outer)


def embed(kernel: DenseKernel, outer: Extent) -> Tensor:
    """The kernel's taps on the lattice of an enclosing extent, zeros elsewhere."""
    weight, inner = kernel.weight, kernel.extent
    for axis in range(2):
        spread = inner.dilation[axis] // outer.dilation[axis]
        dim = 2 + axis
        taps = (weight.shape[dim] - 1) * spread + 1
        if spread > 1:  # write the gaps out as zeros
            gaps = weight.unsqueeze(dim + 1)
            gaps = F.pad(gaps, [0, 0] * (gaps.dim() - dim - 2) + [0, spread - 1])
            weight = gaps.flatten(dim, dim + 1).narrow(dim, 0, taps)
        before = (outer.origin[axis] - inner.origin[axis]) // outer.dilation[axis]
        after = outer.kernel_size[axis] - before - taps
        weight = F.pad(weight, (before, after) if axis else (0, 0, before, after))
    return weight


def execute_assembled(x: Tensor, plan: list[list[DenseKernel]], biases: Biases, geometry: Geometry) -> list[Tensor]:
    """One depthwise convolution per large kernel. Memory: that of the original convolutions."""
    return [
        reduce(add, [_convolve(x, kernel, bias if i == 0 else None, geometry) for i, kernel in enumerate(kernels)])
        for kernels, bias in zip(plan, biases, strict=True)
    ]


def _convolve(x: Tensor, kernel: DenseKernel, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """conv2d pads both sides alike; where that does not give the wanted output, the map is padded (or cut) first."""
    padding, after, symmetric = list(kernel.extent.origin), [], True
    for axis in range(2):
        out, stride = geometry.out_size[axis], geometry.stride[axis]
        reach = kernel.extent.dilation[axis] * (kernel.extent.kernel_size[axis] - 1)
        after.append((out - 1) * stride + reach + 1 - x.shape[2 + axis] - padding[axis])
        # Up to stride - 1 rows at the end may go unread: a conv2d that pads that much more gives the same output.
        symmetric = symmetric and 0 <= padding[axis] - after[axis] < stride
    if not symmetric:
        x = F.pad(x, (padding[1], after[1], padding[0], after[0]))
        padding = [0, 0]
    return F.conv2d(x, kernel.weight, bias, geometry.stride, padding, kernel.extent.dilation, x.shape[1])


# ---- toeplitz: the assembled kernels in one pass ---------------------------------------------------------------------


def execute_toeplitz(x: Tensor, plan: list[list[DenseKernel]], biases: Biases, geometry: Geometry) -> list[Tensor]:
    """All kernels of an output in one operator (:func:`ops.toeplitz_conv`); as assembled where that does not apply.

    It applies to stride 1, dilation 1, one filter per channel, and outputs of the size of the map.
    """
    size = (x.shape[2], x.shape[3])
    kernels = [kernel for entry in plan for kernel in entry]
    plain = all(kernel.extent.dilation == (1, 1) and kernel.weight.shape[0] == x.shape[1] for kernel in kernels)
    if not plain or tuple(geometry.stride) != (1, 1) or tuple(geometry.out_size) != size:
        return execute_assembled(x, plan, biases, geometry)
    return [
        toeplitz_conv(
            x, [kernel.weight for kernel in entry], [side for kernel in entry for side in kernel.extent.origin], bias
        )
        for entry, bias in zip(plan, biases, strict=True)
    ]


# ---- the choice -----------------------------------------------------------------------------------------------------


class ExecutionForm(NamedTuple):
    prepare: Callable[[Outputs], Any]
    execute: Callable[[Tensor, Any, Biases, Geometry], list[Tensor]]


FORMS: dict[str, ExecutionForm] = {
    "shift": ExecutionForm(prepare_shift, execute_shift),
    "assembled": ExecutionForm(prepare_assembled, execute_assembled),
    "toeplitz": ExecutionForm(prepare_assembled, execute_toeplitz),
}


def choose_form(requested: str) -> str:
    """The form that runs, by name.

    ``"auto"`` takes ``"assembled"``: it needs a T-th of the memory of ``"shift"`` and is the faster of the two.
    ``"toeplitz"`` is taken only where it is asked for, as long as its speed has not been measured on a GPU.

    Raises:
        ValueError: no form has this name.
    """
    if requested == "auto":
        return "assembled"
    if requested not in FORMS:
        raise ValueError(f"form: got {requested!r}, expected 'auto' or one of {sorted(FORMS)}")
    return requested
