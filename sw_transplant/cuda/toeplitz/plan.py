"""The static geometry of one Toeplitz kernel: which products there are, and where everything lies in shared memory.

Pure Python, and hashable: a plan is the key that a kernel is compiled for. It knows nothing of batch and channels, nor
of the size of a map that is cut into tiles.

A dense depthwise kernel is a sum of `lines` one-dimensional kernels: its columns if it is contracted along the rows of
the map (axis 0), its rows if it is contracted along the columns (axis 1): docs/design/toeplitz.md. Shared memory is
counted in words of 32 bits: one TF32 value, or two neighbours of 16 bits along the contracted axis.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

Size = tuple[int, int]

MAX_KERNELS = 4  # that one kernel of the GPU takes
TAP_MARGIN = 14  # zeros before a line of taps; 13 after it: as far as a fragment that touches the line reaches out
IN_FLIGHT = 16  # words that a thread has under way from global memory
MAX_REACH = 4096  # taps of a kernel along an axis: keeps all offsets within 32 bits


@dataclass(frozen=True)
class Kernel:
    """One dense depthwise kernel.

    Attributes:
        size: taps (kh, kw).
        origin: zeros (top, left) before the map, any integers: output (h, w) reads rows h - top .. h - top + kh - 1.
        axis: contracted along the rows (0) or along the columns (1) of the map.
    """

    size: Size
    origin: Size
    axis: int

    @property
    def lines(self) -> int:
        return self.size[1 - self.axis]

    @property
    def length(self) -> int:
        return self.size[self.axis]


@dataclass(frozen=True)
class Copy:
    """A zero-padded copy of the block's part of the map in shared memory.

    Word (i, j) holds the map's value at (row + i * step[0], column + j * step[1]) of the tile, and for 16-bit values in
    its upper half the next one along the contracted axis.
    """

    first: int  # where word (0, 0) lies, from the beginning of the plane
    lead: int  # words before it that belong to the padding of row 0
    row: int
    column: int
    step: Size
    rows: int
    pitch: int  # words from one row to the next

    @property
    def end(self) -> int:
        return self.first + self.rows * self.pitch


class Area(NamedTuple):
    """The part of a map that is staged, from the tile's first row and column on.

    Its columns come in runs that are 16 bytes in global memory, and begin at a multiple of that in a row: `unit` of
    them for each math.
    """

    row: int
    column: int
    rows: int
    columns: int


def is_packed(math: str) -> bool:
    """Whether a word has two values."""
    return math in ("float16", "bfloat16")


def unit(math: str) -> int:
    """Values of 16 bytes."""
    return 8 if is_packed(math) else 4


def widest_vector(math: str, count: int) -> int:
    """The most values of one load, 16 bytes at most, if rows (or pixels of a channels_last map) have this many."""
    return next(v for v in (8, 4, 2, 1) if v <= unit(math) and count % v == 0)


@dataclass(frozen=True)
class Plan:
    """Everything that a Toeplitz kernel is compiled for.

    Attributes:
        math: "tf32", "tf32x3" (three products of split operands: float32 accuracy), "float16" or "bfloat16".
        kernels: the dense kernels whose responses are added.
        whole: per axis the size of the map if one tile covers it, else None: then the tile has a halo.
        blocks: blocks of 16 output rows that a warp owns; it owns all columns of them.
        parts: warps that share a tile, below each other.
        columns: groups of 8 output columns of a tile.
        planes: that a thread block has in shared memory at once: images of one channel, or, of channels_last maps,
            neighbouring channels of one image.
        registers: most registers of a thread.
        origins: per axis the contracted position that the first step of the products begins at, from the tile's first
            output (from the warp's first output row for axis 0 with a halo).
        channels_last: maps are read and written in this memory format, instead of contiguous.
        rounds: planes that a warp takes one after the other.
        vector: values that are read or written at once: neighbours of a row, or channels of a pixel.
    """

    math: str
    kernels: tuple[Kernel, ...]
    whole: tuple[int | None, int | None]
    blocks: int
    parts: int
    columns: int
    planes: int
    registers: int
    origins: Size
    channels_last: bool = False
    rounds: int = 1
    vector: int = 1

    @property
    def packed(self) -> bool:
        """Whether a word has two values."""
        return is_packed(self.math)

    @property
    def channels(self) -> int:
        """Channels of a thread block."""
        return self.planes if self.channels_last else 1

    @property
    def seats(self) -> int:
        """Planes that are worked on at once."""
        return self.planes // self.rounds

    @property
    def depth(self) -> int:
        """Contracted positions of one step: 8 words."""
        return 16 if self.packed else 8

    @property
    def tile(self) -> Size:
        """Rows and columns of the output that the warps of a plane own, beyond the map's edge too."""
        return 16 * self.blocks * self.parts, 8 * self.columns

    @property
    def step_out(self) -> Size:
        """Rows and columns from one tile to the next: what a tile gives of the output."""
        return self.whole[0] or self.tile[0], self.whole[1] or self.tile[1]

    @property
    def threads(self) -> int:
        return 32 * self.parts * self.seats

    def contracted(self, axis: int) -> list[Kernel]:
        return [kernel for kernel in self.kernels if kernel.axis == axis]

    def steps(self, axis: int) -> int:
        """Steps that cover every position that kernels contracted along this axis read."""
        end = self.whole[axis]
        if end is None:
            span = 16 * self.blocks if axis == 0 else self.tile[1]  # each warp begins at its own rows
            end = span + max(kernel.length - 1 - kernel.origin[axis] for kernel in self.contracted(axis))
        return max(0, -(-(end - self.origins[axis]) // self.depth))

    @functools.cached_property
    def copies(self) -> dict[int, Copy]:
        """The copy that the kernels contracted along each axis read. TF32 values need one copy only."""
        if not self.packed:
            copy = self._copy([0, 1], 0)
            return {axis: copy for axis in (0, 1) if self.contracted(axis)}
        found: dict[int, Copy] = {}
        for axis in (1, 0):
            if self.contracted(axis):
                found[axis] = self._copy([axis], max([copy.end for copy in found.values()], default=0))
        return found

    def _copy(self, axes: list[int], after: int) -> Copy:
        """The smallest copy for kernels contracted along these axes, from word `after` of the plane on."""
        first, last = [0, 0], [0, 0]  # positions that are read for an output that exists, last one excluded
        contracted: list[int | None] = [None, None]
        for axis in axes:
            kernels = self.contracted(axis)
            if not kernels:
                continue
            contracted[axis] = self.origins[axis]
            warps = self.parts if axis == 0 and self.whole[0] is None else 1
            end = self.origins[axis] + (warps - 1) * 16 * self.blocks + self.steps(axis) * self.depth
            first[axis], last[axis] = min(first[axis], self.origins[axis]), max(last[axis], end)
            other = 1 - axis
            first[other] = min(first[other], *(-kernel.origin[other] for kernel in kernels))
            reach = max(kernel.size[other] - 1 - kernel.origin[other] for kernel in kernels)
            last[other] = max(last[other], self.step_out[other] + reach)
        step = (2, 1) if self.packed and axes == [0] else (1, 2) if self.packed else (1, 1)
        begin, missing = contracted[1] if contracted[1] is not None else first[1], 0
        if self.whole[1] is not None:
            # Zeros at the end of a row serve as those before the next row.
            begin = max(begin, 0) if contracted[1] is None else begin
            missing = max(0, begin - first[1])
            width = max(last[1], self.whole[1] + missing) - begin
        else:
            begin = min(begin, first[1])
            begin -= begin % unit(self.math)  # staged by so many, and matrices are loaded by 4 words
            width = last[1] - begin
        top = first[0]
        if contracted[0] is not None:
            top -= (top - contracted[0]) % step[0]  # pairs of rows begin where the steps begin
        # Without bank conflicts: 8 rows of 4 words, or (rows of pairs) 4 rows of 8 words.
        pitch = padded(-(-width // step[1]), 16, 8) if step == (2, 1) else padded(-(-width // step[1]), 8, 4)
        lead = padded(-(-missing // step[1]), 4)
        return Copy(padded(after, 4) + lead, lead, top, begin, step, -(-(last[0] - top) // step[0]), pitch)

    @functools.cached_property
    def area(self) -> Area:
        """What is staged of the map: what any copy has of it. With pairs of rows, rows begin where pairs do."""
        copies = set(self.copies.values())
        down = max(copy.step[0] for copy in copies)
        anchor = next(copy.row for copy in copies if copy.step[0] == down)
        row, column = min(copy.row for copy in copies), min(copy.column for copy in copies)
        row -= (row - anchor) % down
        end = max(copy.row + copy.rows * copy.step[0] for copy in copies)
        right = max(copy.column + copy.pitch * copy.step[1] for copy in copies)
        return Area(row, column, padded(end - row, down), right - column)

    @property
    def out_pitch(self) -> int:
        """Words from one row of results to the next: pairs of 4 rows then hit different banks."""
        return padded(self.tile[1], 16, 8)

    @functools.cached_property
    def plane_words(self) -> int:
        """Shared memory of one plane: the copies, and later in their place the results."""
        copies = max(copy.end for copy in self.copies.values())
        # Channels of a pixel are staged at once: planes that are an odd multiple of 4 words apart hit different banks.
        modulus, residue = (8, 4) if self.channels_last else (4, 0)
        return padded(max(copies, self.tile[0] * self.out_pitch), modulus, residue)

    def first_tap(self, number: int) -> int:
        """Where the lines of kernel `number` begin, from the beginning of the taps."""
        return sum(kernel.lines * line_words(kernel) for kernel in self.kernels[:number])

    @property
    def tap_words(self) -> int:
        """Shared memory of the taps of one channel."""
        return self.first_tap(len(self.kernels))

    @functools.cached_property
    def shared_words(self) -> int:
        """Shared memory of a thread block: planes, taps, and room for what is read for outputs beyond the edge."""
        used = self.planes * self.plane_words + self.channels * self.tap_words
        last_plane, beyond = (self.planes - 1) * self.plane_words, 0
        for axis, copy in self.copies.items():
            for kernel in self.contracted(axis):
                if axis == 1:
                    row = self.tile[0] + kernel.size[0] - 1 - kernel.origin[0] - copy.row
                    beyond = max(beyond, copy.first + row * copy.pitch)
                else:
                    column = self.tile[1] + kernel.size[1] - 1 - kernel.origin[1] - copy.column
                    beyond = max(beyond, copy.end - copy.pitch + column)
        return max(used, last_plane + beyond)


def line_words(kernel: Kernel) -> int:
    """Shared memory of one line of taps with zeros on both sides."""
    return TAP_MARGIN + kernel.length + TAP_MARGIN - 1


def padded(value: int, modulus: int, residue: int = 0) -> int:
    """The smallest number of at least `value` that leaves this residue."""
    return value + (residue - value) % modulus
