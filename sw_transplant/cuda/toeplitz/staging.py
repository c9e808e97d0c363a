# mypy: disallow-untyped-defs=False
"""From global to shared memory: zero-padded copies of a map, as words that the products take."""

import torch
from numba.cuda import types

from sw_transplant.cuda.intrinsics import SIMULATOR, device_function, float32_bits, quotient
from sw_transplant.cuda.toeplitz.plan import IN_FLIGHT, Copy, Region, is_packed
from sw_transplant.cuda.toeplitz.words import round_to_tf32

if SIMULATOR:
    from numba.cuda.simulator.kernelapi import FakeCUDALocal

    class cuda:
        """What the simulator puts in place of `numba.cuda`, but only in the module that has the kernel itself."""

        local = FakeCUDALocal()

else:
    from numba import cuda  # type: ignore[no-redef]

int32, uint32, int64, uint64 = types.int32, types.uint32, types.int64, types.uint64

DTYPES = {
    "tf32": torch.float32,
    "tf32x3": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
ALIGNMENT = None if SIMULATOR else 16  # bytes, of shared memory: matrices are loaded by rows of 16


def raw_type(math: str):
    """How a value is taken to shared memory: as it is stored, 16 bits as an integer."""
    return types.uint16 if is_packed(math) else types.float32


def word_of(math: str):
    """The device function (low, high) -> word. TF32 values are rounded here, once; `high` is for 16-bit values."""
    packed, rounded = is_packed(math), math == "tf32"

    @device_function
    def word(low, high):
        if packed:
            return uint32(uint32(low) | uint32(uint32(high) << uint32(16)))
        if rounded:
            return round_to_tf32(low)
        return float32_bits(low)

    return word


def stage_map_of(copy: Copy, math: str, threads: int, region: Region | None = None):
    """The device function that fills a copy, or a region of it, with zeros where it lies outside of the map.

    Its arguments: shared memory, the word where the plane begins, the map of one channel, the tile's first row and
    column, the size of the map, and the number of the thread among `threads`.
    """
    region = region or Region(0, 0, copy.rows, copy.pitch)
    rows, pitch, lead, words = region.rows, copy.pitch, copy.lead, region.words
    start = copy.first + region.row * pitch + region.word
    row_step, column_step = copy.step
    row, column = copy.row + region.row * row_step, copy.column + region.word * column_step
    rows_inside, columns_inside = region.rows_inside, region.columns_inside
    raw, word, packed = raw_type(math), word_of(math), is_packed(math)
    across, down = arrange(threads, words, rows)
    chunks = -(-words // across)
    at_once = max(1, IN_FLIGHT // (2 * chunks if packed else chunks))
    in_flight = chunks * at_once

    @device_function
    def stage_map(shared, plane, source, top, left, height, width, thread):
        low = cuda.local.array(in_flight, raw)
        high = cuda.local.array(in_flight, raw)
        my_row = int32(quotient(uint32(thread), uint32(across)))
        my_column = int32(thread - my_row * across)
        first_x = int32(left + column + my_column * column_step)
        for first in range(my_row, int32(rows), int32(down * at_once)):
            for u in range(at_once):  # all loads, then all stores: the loads overlap
                y = int32(top + row + (first + u * down) * row_step)
                # Counted in 64 bits, offsets that are known become part of the instruction.
                at = int64(int32(y * width + first_x))
                row_read = first < rows - u * down if rows_inside else uint32(y) < uint32(height)
                for k in range(chunks):
                    x = int32(first_x + k * (across * column_step))
                    read = my_column < words - k * across if columns_inside else uint32(x) < uint32(width)
                    low[u * chunks + k] = raw(0)
                    high[u * chunks + k] = raw(0)
                    if row_read and read:
                        low[u * chunks + k] = source[at + k * (across * column_step)]
                    if packed:
                        if row_step == 2:
                            if uint32(int32(y + 1)) < uint32(height) and read:
                                high[u * chunks + k] = source[at + width + k * (across * column_step)]
                        elif row_read and (read if columns_inside else uint32(int32(x + 1)) < uint32(width)):
                            high[u * chunks + k] = source[at + (k * (across * column_step) + 1)]
            to = uint64(uint32(plane + start + first * pitch + my_column))
            for u in range(at_once):
                for k in range(chunks):
                    staged = word(low[u * chunks + k], high[u * chunks + k])
                    if first < rows - u * down and my_column < words - k * across:
                        shared[uint64(to + uint64(u * down * pitch + k * across))] = staged
        if lead > 0:
            for q in range(int32(thread), int32(lead), int32(threads)):
                shared[uint32(plane + start - lead + q)] = uint32(0)

    return stage_map


def arrange(threads: int, columns: int, rows: int) -> tuple[int, int]:
    """Threads (across, down) that step over a matrix without divisions, with few of them beside it."""
    across = [2**i for i in range(2, 6) if threads % 2**i == 0]

    def covered(a: int) -> int:
        return -(-columns // a) * a * -(-rows // (threads // a)) * (threads // a)

    best = min(across, key=lambda a: (covered(a), -a))
    return best, threads // best
