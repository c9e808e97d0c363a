"""The normal equations of a layer: second moments of its input over the taps of both strips, summed batch by batch.

A depthwise module is linear in its taps, channel by channel. What least squares need to know of the calibration images
is the Gram matrix of the shifted inputs and their products with the targets. The taps are those of the paper's module
that reach the map: a horizontal strip of n rows and L columns, and a vertical one of L rows and n columns.

No shifted input is ever made. Two taps of one strip are n rows and any columns apart: products of lines (W x W per pair
of rows) hold all their sums, along diagonals. A tap of each strip: the zeros outside the map cut only rows that the
short side of the first reaches over, and columns that the short side of the other does; so the autocorrelation of the
maps, by Fourier transforms, less that of those lines, holds the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sw_transplant.geometry import Size
from sw_transplant.surgery.calibration.channels import MAPS_TOGETHER, each_part

Lines = tuple[int, int, int]
"""Rows or columns of a map: start, stop and step of a slice."""


@dataclass(frozen=True)
class Taps:
    """Where the taps of the strips lie, as offsets from the centre, and which of them reach a map.

    Attributes:
        length: M of the module.
        tile: n; the strips are n wide.
        in_size, out_size, stride: of the map.
    """

    length: int
    tile: int
    in_size: Size
    out_size: Size
    stride: Size

    @property
    def whole(self) -> int:
        """Taps along a strip: n * T."""
        return -(-self.length // self.tile) * self.tile

    @property
    def across(self) -> range:
        """Offsets over the short side."""
        return range(-(self.tile // 2), self.tile - self.tile // 2)

    @property
    def along(self) -> range:
        """Offsets over the long side, whether they reach the map or not."""
        return range(-(self.length // 2), self.whole - self.length // 2)

    def reaching(self, axis: int) -> range:
        """The offsets over the long side along this axis that come to lie on the map for some output."""
        first = -(self.out_size[axis] - 1) * self.stride[axis]
        return range(max(self.along.start, first), min(self.along.stop, self.in_size[axis]))

    @property
    def offsets(self) -> Tensor:
        """``(P, 2)`` rows ``(dy, dx)``: the horizontal strip row by row, then the vertical one."""
        horizontal = [(dy, dx) for dy in self.across for dx in self.reaching(1)]
        vertical = [(dy, dx) for dy in self.reaching(0) for dx in self.across]
        return torch.tensor(horizontal + vertical, device="cpu")

    @property
    def rows_of_whole(self) -> Tensor:
        """``(P,)``: where these taps are among all 2 * n * (n T) of the strips, in the same order."""
        numbers = torch.arange(2 * self.tile * self.whole, device="cpu")
        horizontal = numbers[: self.tile * self.whole].view(self.tile, self.whole)
        vertical = numbers[self.tile * self.whole :].view(self.whole, self.tile)
        start = self.along.start
        x, y = self.reaching(1), self.reaching(0)
        return torch.cat(
            [
                horizontal[:, x.start - start : x.stop - start].flatten(),
                vertical[y.start - start : y.stop - start].flatten(),
            ]
        )

    @property
    def twins(self) -> Tensor:
        """``(n * n, 2)``: taps of the two strips that lie in the same place, around the centre."""
        n, whole, first = self.tile, self.whole, self.across.start - self.along.start
        steps = torch.arange(n, device="cpu")
        horizontal = steps[:, None] * whole + first + steps
        vertical = n * whole + (first + steps)[:, None] * n + steps
        return torch.stack([horizontal.flatten(), vertical.flatten()], 1)


@dataclass
class Moments:
    """Sums over images and positions; ``C`` channels, ``P`` taps.

    Attributes:
        gram: float64 ``(C, P, P)``, of the input at two taps.
        right: ``(C, P)``, of input and target.
        sums: ``(C, P)``, of the input at a tap.
        target, target_squared: ``(C,)``.
        passed: ``(C,)``, of (input - target)**2: what a ghost would miss.
        positions: how many outputs a channel has had.
    """

    gram: Tensor
    right: Tensor
    sums: Tensor
    target: Tensor
    target_squared: Tensor
    passed: Tensor
    positions: int

    def __add__(self, other: Moments) -> Moments:
        total: dict[str, Any] = {e.name: getattr(self, e.name) + getattr(other, e.name) for e in fields(Moments)}
        return Moments(**total)

    def select(self, channels: Tensor | slice) -> Moments:
        """Those of some channels."""
        values: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(Moments)}
        values |= {name: value[channels] for name, value in values.items() if isinstance(value, Tensor)}
        return Moments(**values)

    def spread(self, taps: Taps) -> Moments:
        """The same over all taps of the strips, zeros for those that do not reach the map: for maps of other sizes."""
        where = taps.rows_of_whole.to(self.gram.device)
        count = 2 * taps.tile * taps.whole
        gram = self.gram.new_empty(len(self.gram), count, count)

        def spread_some(some: slice) -> None:
            gram[some].zero_()[:, where[:, None], where] = self.gram[some]

        each_part(spread_some, gram)
        right, sums = self.gram.new_zeros(2, len(self.gram), count)
        right[:, where], sums[:, where] = self.right, self.sums
        return replace(self, gram=gram, right=right, sums=sums)


@dataclass
class Accumulator:
    """Adds batches up to :class:`Moments`; what it holds does not depend on how many come.

    Sums over a batch are taken in the maps' own dtype, float32 at least, and added up in float64.
    """

    taps: Taps
    _sums: dict[str, Tensor] = field(default_factory=dict)
    positions: int = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """One batch.

        Args:
            x: ``(B, C, H, W)``, the module's input.
            y: ``(B, C, H', W')``, what it should give.
        """
        x, y = (computed_in(each.detach()) for each in (x, y))
        parts = each_part(lambda some: self._sums_of(x[:, some], y[:, some]), x.transpose(0, 1), MAPS_TOGETHER)
        for name in parts[0]:
            total = torch.cat([part[name] for part in parts])
            self._sums[name] = self._sums[name].add_(total) if name in self._sums else total
        self.positions += y.shape[0] * y.shape[2] * y.shape[3]

    def _sums_of(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Everything that is summed, of one batch and some channels, which come first."""
        (sh, sw), (height, width) = self.taps.stride, self.taps.out_size
        missed = x[:, :, ::sh, ::sw][:, :, :height, :width] - y
        sums = {
            "passed": missed.square().sum((0, 2, 3), dtype=torch.float64),
            "target": y.sum((0, 2, 3), dtype=torch.float64),
            "target_squared": y.square().sum((0, 2, 3), dtype=torch.float64),
            **self._sums_of_lines("rows", x, y, sh),
            **self._sums_of_lines("columns", x.mT, y.mT, sw),
            **(self._spectra(x) if self.taps.stride == (1, 1) else self._masked_spectra(x)),
        }
        return {name: value.to(torch.promote_types(value.dtype, torch.float64)) for name, value in sums.items()}

    def _sums_of_lines(self, name: str, x: Tensor, y: Tensor, step: int) -> dict[str, Tensor]:
        """Products of rows that stand ``tile`` apart at most, of rows and targets, and sums of rows."""
        before, height = -self.taps.across.start, y.shape[2]
        after = max(0, (height - 1) * step + self.taps.across.stop - x.shape[2])
        padded = F.pad(x, (0, 0, before, after))
        shifted = [padded[:, :, i : i + (height - 1) * step + 1 : step] for i in range(self.taps.tile)]
        lines = torch.cat(shifted, 3).transpose(0, 1).flatten(1, 2)  # (C, B * H', n * W)
        targets = y.transpose(0, 1).flatten(1, 2)
        return {f"{name} x {name}": lines.mT @ lines, f"{name} x targets": lines.mT @ targets, name: lines.sum(1)}

    def _spectra(self, x: Tensor) -> dict[str, Tensor]:
        """For autocorrelations: of maps, of the lines that some offset does not read, and where two of these meet."""
        spectrum = torch.fft.rfft2(x, s=[2 * side for side in self.taps.in_size])
        sums = {"crossings": (spectrum.real.square() + spectrum.imag.square()).sum(0)}
        rows, columns = self._unread(0), self._unread(1)
        for axis, lines, maps in ((0, rows, x), (1, columns, x.mT)):
            along = torch.fft.rfft(maps, n=2 * maps.shape[3]) if lines else maps
            for u in lines:
                sums[f"lines {axis} {u}"] = torch.einsum("ncf,nchf->chf", along[:, :, u].conj(), along)
        for u in rows:
            for v in columns:
                sums[f"corner {u} {v}"] = torch.einsum("nca,ncb->cab", x[:, :, u], x[..., v])
        return sums

    def _unread(self, axis: int) -> list[int]:
        """The rows or columns that some offset over the short side does not read."""
        side = self.taps.in_size[axis]
        return sorted(set().union(*(set(range(side)) - set(range(*lines)) for lines in self._lines_read(axis))))

    def _masked_spectra(self, x: Tensor) -> dict[str, Tensor]:
        """For any stride: cross-correlations of the map without what an offset does not read, for all pairs of them."""
        size = [2 * side for side in self.taps.in_size]
        first = {key: torch.fft.rfft2(_only(x, 2, key), s=size) for key in set(self._lines_read(0))}
        second = {key: torch.fft.rfft2(_only(x, 3, key), s=size) for key in set(self._lines_read(1))}
        return {
            f"crossings {a} {b}": (left.conj() * right).sum(0)
            for a, left in first.items()
            for b, right in second.items()
        }

    def _lines_read(self, axis: int) -> list[Lines]:
        """For every offset over the short side: which rows or columns of the map it reads, as a slice."""
        step, side = self.taps.stride[axis], self.taps.in_size[axis]
        last = (self.taps.out_size[axis] - 1) * step
        return [
            (offset if offset >= 0 else offset % step, max(0, min(side, offset + last + 1)), step)
            for offset in self.taps.across
        ]

    def moments(self) -> Moments:
        """What has been added up so far."""
        parts = each_part(
            lambda some: self._moments({name: value[some] for name, value in self._sums.items()}), self._sums["target"]
        )
        return Moments(
            **{name: torch.cat([part[name] for part in parts]) for name in parts[0]}, positions=self.positions
        )

    def _moments(self, of: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the sums of some channels."""
        channels = len(of["target"])
        taps, n = self.taps, self.taps.tile
        horizontal = self._strip(of, "rows", 1)
        vertical = self._strip(of, "columns", 0)
        # The lines of columns are tap by tap over the short side; here the vertical strip goes row by row.
        wide, high = len(taps.reaching(1)), len(taps.reaching(0))
        turned = vertical[0].view(channels, n, high, n, high).permute(0, 2, 1, 4, 3).flatten(3, 4).flatten(1, 2)
        across = self._crossings(of).reshape(channels, n * wide, high * n)
        gram = torch.cat([torch.cat([horizontal[0], across], 2), torch.cat([across.mT, turned], 2)], 1)
        right, sums = (torch.cat([horizontal[i], vertical[i].view(channels, n, high).mT.flatten(1)], 1) for i in (1, 2))
        totals = {name: of[name] for name in ("target", "target_squared", "passed")}
        return {"gram": gram, "right": right, "sums": sums, **totals}

    def _strip(self, of: dict[str, Tensor], name: str, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gram matrix, products with the targets and sums of a strip's taps: sums along diagonals of line products."""
        n, side, step = self.taps.tile, self.taps.in_size[axis], self.taps.stride[axis]
        outputs, reach = self.taps.out_size[axis], self.taps.reaching(axis)
        count = len(reach)
        before = -reach.start
        after = max(0, (outputs - 1) * step + reach.stop - side)
        squares, products, lines = of[f"{name} x {name}"], of[f"{name} x targets"], of[name]
        channels = lines.shape[0]
        squares = F.pad(squares.view(channels, n, side, n, side).transpose(2, 3), (before, after, before, after))
        products = F.pad(products.view(channels, n, side, outputs), (0, 0, before, after))
        lines = F.pad(lines.view(channels, n, side), (before, after))
        gram = squares.new_zeros(channels, n, n, count, count)
        right, sums = lines.new_zeros(2, channels, n, count)
        for w in range(outputs):
            here = slice(w * step, w * step + count)
            gram += squares[..., here, here]
            right += products[:, :, here, w]
            sums += lines[:, :, here]
        return gram.transpose(2, 3).reshape(channels, n * count, n * count), right.flatten(1), sums.flatten(1)

    def _correlation(self, of: dict[str, Tensor], rows: Lines, columns: Lines) -> Tensor:
        """``(C, 2 H, 2 W)``: of the rows that are read with the columns that are read, by difference, circular."""
        size = [2 * side for side in self.taps.in_size]
        if f"crossings {rows} {columns}" in of:
            return torch.fft.irfft2(of[f"crossings {rows} {columns}"], s=size)
        total = torch.fft.irfft2(of["crossings"].to(torch.complex128), s=size)
        (height, width), device = self.taps.in_size, total.device
        y, x = torch.arange(height, device=device), torch.arange(width, device=device)
        without = [sorted(set(range(side)) - set(range(*read))) for side, read in ((height, rows), (width, columns))]
        for u in without[0]:  # from (u, a) to (b, a + d)
            total[:, (y - u) % size[0]] -= torch.fft.irfft(of[f"lines 0 {u}"], n=size[1])
        for v in without[1]:  # from (b + d, a) to (b, v)
            from_column = torch.fft.irfft(of[f"lines 1 {v}"], n=size[0])
            # (C, W, 2 H), at [a, d] the sum of x[b, v] * x[b + d, a]
            turned = from_column[..., -torch.arange(size[0], device=device)].mT  # (C, 2 H, W)
            total[..., (v - x) % size[1]] -= turned
            for u in without[0]:
                corner = of[f"corner {u} {v}"].mT  # (C, b, a)
                total[:, ((y - u) % size[0])[:, None], ((v - x) % size[1])[None]] += corner
        return total

    def _crossings(self, of: dict[str, Tensor]) -> Tensor:
        """``(C, n, wide, high, n)``: a tap of the horizontal strip times one of the vertical strip."""
        size = [2 * side for side in self.taps.in_size]
        x, y = (torch.tensor(list(self.taps.reaching(axis)), device="cpu") for axis in (1, 0))
        rows, columns = self._lines_read(0), self._lines_read(1)
        known = {(a, b): self._correlation(of, a, b) for a in set(rows) for b in set(columns)}
        blocks = []
        for a, dy in zip(rows, self.taps.across, strict=True):
            line = []
            for b, dx in zip(columns, self.taps.across, strict=True):
                down = ((y - dy) % size[0]).to(known[a, b].device)
                right = ((dx - x) % size[1]).to(known[a, b].device)
                line.append(known[a, b][:, down[None, :], right[:, None]])  # (C, wide, high)
            blocks.append(torch.stack(line, -1))
        return torch.stack(blocks, 1)


def computed_in(x: Tensor) -> Tensor:
    """A map in float32, or float64 if it is that, on a device whose sums can be float64."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.promote_types(x.dtype, torch.float32))


def _only(x: Tensor, axis: int, lines: Lines) -> Tensor:
    """The map without the rows or columns that are not in a slice."""
    start, stop, step = lines
    if (start, step) == (0, 1) and stop >= x.shape[axis]:
        return x
    kept = torch.zeros(x.shape[axis], dtype=x.dtype, device=x.device)
    kept[start:stop:step] = 1
    return x * (kept[:, None] if axis == 2 else kept)
