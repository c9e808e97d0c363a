"""The static geometry of one weight-gradient kernel: which products there are, and where everything lies.

    dW[i, j] = sum over images, h, w of grad[h, w] * x[h + i - top, w + j - left]

Gradient times map is a matrix product for each line of taps, and a tap is the sum of a diagonal of it. Products of 16
rows of the gradient with 8 of the map that are equally far apart are added to the same 16 x 8 sums: 9 of them for 51
taps, whatever the size of the map (docs/design/toeplitz.md has the picture). Lines along the rows are the same, but
mirrored.

Pure Python, and hashable: a plan is the key that a kernel is compiled for. It knows nothing of batch and channels, nor
of the size of a map that is cut into tiles. Shared memory is counted in words of 32 bits: one TF32 value, or two of 16
bits that are neighbours in a row.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

from sw_transplant.cuda.toeplitz.plan import Area, Copy, Kernel, Size, is_packed, padded, unit

ROWS, COLUMNS = 16, 8  # of a fragment of sums: positions in the gradient, positions in the map


class Group(NamedTuple):
    """Lines of one kernel that a warp owns."""

    kernel: int
    first: int
    lines: int


class Variant(NamedTuple):
    """What the code of a group depends on."""

    kernel: int
    lines: int
    parity: int  # of the column of the copy that the first line begins at, for 16-bit values


@dataclass(frozen=True)
class GradientPlan:
    """Everything that a weight-gradient kernel is compiled for.

    Attributes:
        math: as in `toeplitz.plan.Plan`.
        kernels: the dense kernels; their axis is the one that their lines lie along (0: columns of the kernel).
        whole: per axis the size of the map if one tile covers it, else None: then the map's tile has a halo.
        tile: rows and columns of the gradient in a tile; multiples of 16 along an axis that is cut.
        lines: per kernel the lines that a warp owns.
        together: groups of lines whose warps work in one thread block; the others are left to other blocks.
        planes: that a thread block has in shared memory at once: tiles of one channel, or, of channels_last maps,
            neighbouring channels of one tile.
        parts: warps that share the products of a plane and a group; each takes every parts-th step.
        registers: most registers of a thread.
        channels_last, vector: as in `toeplitz.plan.Plan`.
    """

    math: str
    kernels: tuple[Kernel, ...]
    whole: tuple[int | None, int | None]
    tile: Size
    lines: tuple[int, ...]
    together: int
    planes: int
    parts: int
    registers: int
    channels_last: bool = False
    vector: int = 1

    @property
    def packed(self) -> bool:
        """Whether a word has two values."""
        return is_packed(self.math)

    @property
    def depth(self) -> int:
        """Positions that one product sums over."""
        return 16 if self.packed else 8

    @property
    def channels(self) -> int:
        """Channels of a thread block."""
        return self.planes if self.channels_last else 1

    @property
    def items(self) -> int:
        """Tiles that a thread block has at once."""
        return self.planes // self.channels

    @property
    def plane_warps(self) -> int:
        return self.together * self.parts

    @property
    def warps(self) -> int:
        return self.plane_warps * self.planes

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def most_resident(self) -> int:
        """Thread blocks that the registers of a multiprocessor are enough for: each quarter has 512 for a lane."""
        return 4 * (512 // self.registers) // self.warps

    @property
    def taps(self) -> int:
        """Taps of all kernels of a channel."""
        return sum(kernel.size[0] * kernel.size[1] for kernel in self.kernels)

    def steps(self, axis: int) -> int:
        """Products that it takes to sum over a tile, for lines along this axis."""
        return -(-self.tile[1 - axis] // self.depth)

    def blocks(self, axis: int) -> int:
        """Fragments that the tile of the gradient has along this axis."""
        return -(-self.tile[axis] // ROWS)

    # Groups of lines.

    @functools.cached_property
    def groups(self) -> tuple[Group, ...]:
        return tuple(
            Group(number, first, min(self.lines[number], kernel.lines - first))
            for number, kernel in enumerate(self.kernels)
            for first in range(0, kernel.lines, self.lines[number])
        )

    def first_group(self, number: int) -> int:
        """The first group of kernel `number`."""
        return sum(-(-k.lines // lines) for k, lines in zip(self.kernels[:number], self.lines[:number], strict=True))

    @property
    def shares(self) -> int:
        """Thread blocks that share the lines of a channel."""
        return -(-len(self.groups) // self.together)

    @functools.cached_property
    def variants(self) -> tuple[Variant, ...]:
        return tuple(dict.fromkeys(self._variant(group) for group in self.groups))

    @functools.cached_property
    def variant_of_group(self) -> tuple[int, ...]:
        return tuple(self.variants.index(self._variant(group)) for group in self.groups)

    def _variant(self, group: Group) -> Variant:
        kernel, parity = self.kernels[group.kernel], 0
        if self.packed and kernel.axis == 0:
            parity = (group.first - kernel.origin[1] - self.map_copy.column) % 2
        return Variant(group.kernel, group.lines, parity)

    # Products along the lines.

    def lead(self, number: int) -> int:
        """Block n of 8 positions of the map begins at 8 n - lead: at the first tap, if nothing stands against it.

        Matrices of 16-bit values along the rows are loaded from multiples of 16 bytes: for all kernels the blocks then
        begin where they do for the longest of them, at a multiple of 4 positions, where what is staged lies well.
        """
        kernel = self.kernels[number]
        start = kernel.origin[kernel.axis]
        if not (self.packed and kernel.axis == 1):
            return start
        longest = max((k for k in self.kernels if k.axis == 1), key=lambda k: k.length)
        return padded(start, COLUMNS, padded(longest.origin[1], 4) % COLUMNS)

    @functools.cached_property
    def bands(self) -> tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]:
        """Per kernel the blocks n of the map, each with the blocks m of the gradient that it has taps with."""
        return tuple(self._band(number) for number in range(len(self.kernels)))

    def _band(self, number: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        kernel, lead = self.kernels[number], self.lead(number)
        axis, start = kernel.axis, kernel.origin[kernel.axis]
        extent = self.tile[axis]
        whole = self.whole[axis]
        first, last = (0, whole - 1) if whole is not None else (-start, extent - 1 + kernel.length - 1 - start)
        band = []
        for n in range((first + lead) // COLUMNS, (last + lead) // COLUMNS + 1):
            low, high = max(first, COLUMNS * n - lead), min(last, COLUMNS * n - lead + COLUMNS - 1)
            # The taps between position p of the gradient and these: low - p + start .. high - p + start.
            met = tuple(
                m
                for m in range(self.blocks(axis))
                if high - ROWS * m + start >= 0 and low - min(ROWS * m + ROWS, extent) + 1 + start < kernel.length
            )
            if met:
                band.append((n, met))
        return tuple(band)

    @functools.cached_property
    def distances(self) -> tuple[range, ...]:
        """Per kernel the distances n - 2m that occur: one fragment of sums for each, and for each line."""
        found = [[n - 2 * m for n, met in band for m in met] for band in self.bands]
        return tuple(range(min(d), max(d) + 1) if d else range(0) for d in found)

    def first_column(self, number: int) -> int:
        """Tap i lies in column i + row - first_column of a line's fragments, set side by side."""
        kernel = self.kernels[number]
        return kernel.origin[kernel.axis] - self.lead(number) + COLUMNS * self.distances[number].start

    @functools.cached_property
    def sums(self) -> int:
        """Registers of a thread for sums."""
        return max(4 * lines * len(found) for lines, found in zip(self.lines, self.distances, strict=True))

    # Shared memory.

    @functools.cached_property
    def grad_copy(self) -> Copy:
        """The gradient, with zeros below and beside it."""
        rows = columns = 0
        for kernel in self.kernels:
            extents = ROWS * self.blocks(kernel.axis), self.depth * self.steps(kernel.axis)
            down, across = extents if kernel.axis == 0 else extents[::-1]
            rows, columns = max(rows, down), max(columns, across)
        return Copy(0, 0, 0, 0, (1, self._values), rows, self._pitch(columns))

    @functools.cached_property
    def map_copy(self) -> Copy:
        """The map, with its halo, or zeros, around it."""
        first, last = [2**31, 2**31], [-(2**31), -(2**31)]
        lead = 0
        for number, kernel in enumerate(self.kernels):
            if not self.bands[number]:
                continue
            axis, other = kernel.axis, 1 - kernel.axis
            blocks = [n for n, _ in self.bands[number]]
            before, reach = self.lead(number), kernel.lines - 1 - kernel.origin[other]
            first[axis] = min(first[axis], COLUMNS * blocks[0] - before)
            last[axis] = max(last[axis], COLUMNS * (blocks[-1] + 1) - before)
            first[other] = min(first[other], -kernel.origin[other])
            last[other] = max(last[other], self.tile[other] + reach)
            if axis == 1:
                lead = before
        row, column = first
        column -= (column + lead) % COLUMNS if self.packed else column % unit(self.math)
        pitch = self._pitch(last[1] - column)
        return Copy(padded(self.grad_copy.end, 4), 0, row, column, (1, self._values), last[0] - row, pitch)

    @property
    def grad_area(self) -> Area:
        """What is staged of the gradient: the rest of its copy stays zero."""
        return self._area(self.grad_copy, self.tile)

    @property
    def map_area(self) -> Area:
        """What is staged of the map: all of its copy but what lies beyond the edges of a whole map."""
        copy = self.map_copy
        return self._area(copy, (copy.row + copy.rows, copy.column + copy.pitch * self._values))

    def _area(self, copy: Copy, end: Size) -> Area:
        """The part of a copy before this row and column, without what is beyond the edges of a whole map."""
        rows, columns = self.whole
        top, bottom = (copy.row, end[0]) if rows is None else (max(copy.row, 0), min(end[0], rows))
        left, right = (copy.column, end[1]) if columns is None else (max(copy.column, 0), min(end[1], columns))
        left -= left % unit(self.math)
        return Area(top, left, bottom - top, right - left)

    @functools.cached_property
    def plane_words(self) -> int:
        """Shared memory of one plane, with room for what is multiplied with zeros beyond the edge of a copy."""
        copy, rows = self.map_copy, self.map_copy.rows
        for kernel in self.kernels:
            if kernel.axis == 1:
                summed = self.depth * self.steps(1) + kernel.lines - kernel.origin[0]
                rows = max(rows, summed - copy.row)
            else:
                summed = self.depth * self.steps(0) + kernel.lines - kernel.origin[1] - copy.column
                rows = max(rows, copy.rows + summed // (self._values * copy.pitch))
        modulus, residue = (8, 4) if self.channels_last else (4, 0)  # as in `toeplitz.plan.Plan`
        return padded(copy.first + rows * copy.pitch + COLUMNS, modulus, residue)

    @property
    def scratch_pitch(self) -> int:
        """Words from one row of a line's fragments to the next: pairs of 4 rows then hit different banks."""
        return padded(COLUMNS * max(map(len, self.distances)), 16, 8)

    @functools.cached_property
    def shared_words(self) -> int:
        """Shared memory of a thread block: the planes, and later in their place a line's fragments of each warp."""
        return max(self.planes * self.plane_words, self.warps * ROWS * self.scratch_pitch)

    @property
    def _values(self) -> int:
        return 2 if self.packed else 1

    def _pitch(self, columns: int) -> int:
        """Words of a row. Without bank conflicts: 8 rows of 4 words, and 4 pairs of rows of 8 words."""
        return padded(-(-columns // self._values), 8, 4)

    @property
    def applies(self) -> bool:
        """Whether there are products for every kernel: one whose taps are all beside the map has none."""
        return all(self.bands) and min(self.map_area.rows, self.map_area.columns) > 0
