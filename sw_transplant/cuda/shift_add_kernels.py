# mypy: disallow-untyped-defs=False
"""The kernels of shift-and-add: two gathers, as `shift_add` launches them."""

import torch
from numba import cuda
from numba.cuda import types

from sw_transplant.cuda.intrinsics import SCALARS, advance, device_function, quotient
from sw_transplant.cuda.shift_add import MAX_THREADS, PER_THREAD
from sw_transplant.cuda.sources import KernelSource

int32, uint32, int64 = types.int32, types.uint32, types.int64

ABSENT = -(2**31)  # in place of y: the row adds nothing to this block

# Blocks that must fit on a multiprocessor: as many as leave every register in place.
RESIDENT_BLOCKS = {torch.float32: 5, torch.float64: 4, torch.float16: 3, torch.bfloat16: 3}


@device_function
def where_row(r, rows, groups, channel):
    """Where row r = k * rows + p of a channel's table begins in placements (K, groups, rows, 3)."""
    k = int64(quotient(uint32(r), uint32(rows)))
    g = channel if groups > 1 else 0
    return ((k * groups + g) * rows + (r - k * rows)) * 3


def forward_source(dtype: torch.dtype) -> KernelSource:
    """The forward kernel for one dtype."""
    scalar, count = SCALARS[dtype], PER_THREAD[dtype]
    stored, computed, widen, narrow = scalar.stored, scalar.computed, scalar.widen, scalar.narrow

    def shift_add_forward(
        z, placements, out, batch, channels, groups, branches, rows, tiles, z_height, z_width, height, width,
        stride_h, stride_w, images, parts, step, z_image, out_image,
    ):  # fmt: skip
        # Rows (offset in z, y, x). Indices are unsigned: Numba tests whether signed ones count from the end.
        table = cuda.shared.array(0, int32)
        values = cuda.local.array(count, stored)
        sums = cuda.local.array(count, computed)
        read = cuda.local.array(count, int32)
        write = cuda.local.array(count, int32)
        top = cuda.local.array(count, int32)
        left = cuda.local.array(count, int32)

        thread = int32(cuda.threadIdx.x)
        block = uint32(cuda.blockIdx.x)
        block_c = quotient(block, uint32(parts))
        part = int32(block - block_c * uint32(parts))
        block_b = quotient(block_c, uint32(channels))
        channel = int32(block_c - block_b * uint32(channels))
        image = int32(block_b * uint32(images))
        plane = int32(height * width)
        z_plane = int32(z_height * z_width)
        start = int32(part * step * count)
        ahead = int32(min(images, batch - image) * plane - start - thread)  # outputs from this thread's first one on

        # A row that touches none of this block's outputs is passed over by the whole block.
        first_row = int32(quotient(uint32(start), uint32(width))) * stride_h
        last_row = int32(quotient(uint32(min(start + step * count, plane) - 1), uint32(width))) * stride_h
        last_column = (width - 1) * stride_w
        for r in range(thread, int32(branches * rows), int32(cuda.blockDim.x)):
            source = where_row(r, rows, groups, channel)
            tile, y, x = placements[source], placements[source + 1], placements[source + 2]
            slot = uint32(3 * r)
            table[slot + uint32(1)] = int32(ABSENT)
            seen = y + last_row >= 0 and y + first_row < z_height and x + last_column >= 0 and x < z_width
            if seen and tile >= 0 and tile < tiles:
                table[slot] = int32(tile * z_plane + y * z_width + x)
                table[slot + uint32(1)] = y
                table[slot + uint32(2)] = x
        cuda.syncthreads()
        if thread >= step:
            return

        for v in range(count):
            e = uint32(start + thread + min(v * step, ahead - 1))  # beyond the end: the last one again, not stored
            b = quotient(e, uint32(plane))
            q = uint32(e - b * uint32(plane))
            h = quotient(q, uint32(width))
            top[v] = int32(h) * stride_h
            left[v] = int32(q - h * uint32(width)) * stride_w
            read[v] = int32(int32(b) * z_image + top[v] * z_width + left[v])
            write[v] = int32(int32(b) * out_image + int32(q))

        begin = int64(image) * channels + channel
        block_z = advance(z, begin * tiles * z_plane)
        block_out = advance(out, begin * plane)
        nothing = narrow(computed(0))
        slot = uint32(0)
        for _ in range(branches):
            for v in range(count):
                sums[v] = computed(0)
            for _ in range(rows):
                y = table[slot + uint32(1)]
                if y != ABSENT:
                    offset = table[slot]
                    x = table[slot + uint32(2)]
                    for v in range(count):  # all loads, then all sums: the loads overlap
                        values[v] = nothing
                        if uint32(top[v] + y) < uint32(z_height) and uint32(left[v] + x) < uint32(z_width):
                            values[v] = block_z[int32(read[v] + offset)]
                    for v in range(count):
                        sums[v] += widen(values[v])
                slot = uint32(slot + uint32(3))
            for v in range(count):
                if int32(v * step) < ahead:
                    block_out[write[v]] = narrow(sums[v])
            block_out = advance(block_out, int64(batch) * channels * plane)

    memory = types.CPointer(stored)
    signature = types.void(memory, types.CPointer(int32), memory, *[int32] * 17)
    return KernelSource(shift_add_forward, signature, (MAX_THREADS, RESIDENT_BLOCKS[dtype]))


def backward_source(dtype: torch.dtype, stride_h: int, stride_w: int) -> KernelSource:
    """The backward kernel for one dtype and stride: a division by a known stride is cheap, by 1 it is nothing."""
    scalar, count = SCALARS[dtype], PER_THREAD[dtype]
    stored, computed, widen, narrow = scalar.stored, scalar.computed, scalar.widen, scalar.narrow

    def shift_add_backward(
        grad, placements, grad_z, batch, channels, groups, branches, rows, tiles, z_height, z_width, height, width,
        images, parts, step, z_image, out_image, run, runs,
    ):  # fmt: skip
        # Rows (k, y, x) sorted by tile; then the tile of every row as given; then where each tile's rows begin.
        table = cuda.shared.array(0, int32)
        values = cuda.local.array(count, stored)
        sums = cuda.local.array(count, computed)
        read = cuda.local.array(count, int32)
        write = cuda.local.array(count, int32)
        top = cuda.local.array(count, int32)
        left = cuda.local.array(count, int32)

        thread = int32(cuda.threadIdx.x)
        block = uint32(cuda.blockIdx.x)
        block_r = quotient(block, uint32(parts))
        part = int32(block - block_r * uint32(parts))
        block_c = quotient(block_r, uint32(runs))
        first_tile = int32(block_r - block_c * uint32(runs)) * run
        block_b = quotient(block_c, uint32(channels))
        channel = int32(block_c - block_b * uint32(channels))
        image = int32(block_b * uint32(images))
        plane = int32(height * width)
        z_plane = int32(z_height * z_width)
        start = int32(part * step * count)
        ahead = int32(min(images, batch - image) * z_plane - start - thread)  # positions from this thread's first on

        # A row's place is the number of rows that come before it: no thread waits for another, and the order within a
        # tile is that of k and p. Tiles count from this block's first one: negative ones come first and are not used.
        total = int32(branches * rows)
        tile_of = uint32(3 * total)
        begin_of = uint32(4 * total)
        for r in range(thread, total, int32(cuda.blockDim.x)):
            tile = placements[where_row(r, rows, groups, channel)]
            table[tile_of + uint32(r)] = int32(tile - first_tile)
        cuda.syncthreads()
        for r in range(thread, total, int32(cuda.blockDim.x)):
            tile = table[tile_of + uint32(r)]
            if 0 <= tile and tile < run:
                place = uint32(0)
                for other in range(total):
                    other_tile = table[tile_of + uint32(other)]
                    if other_tile < tile or (other_tile == tile and other < r):
                        place = uint32(place + uint32(3))
                source = where_row(r, rows, groups, channel)
                table[place] = int32(quotient(uint32(r), uint32(rows)))
                table[place + uint32(1)] = placements[source + 1]
                table[place + uint32(2)] = placements[source + 2]
        for tile in range(thread, int32(run + 1), int32(cuda.blockDim.x)):
            place = int32(0)
            for other in range(total):
                if table[tile_of + uint32(other)] < tile:
                    place = int32(place + 3)
            table[begin_of + uint32(tile)] = place
        cuda.syncthreads()
        if thread >= step:
            return

        for v in range(count):
            e = uint32(start + thread + min(v * step, ahead - 1))  # beyond the end: the last one again, not stored
            b = quotient(e, uint32(z_plane))
            q = uint32(e - b * uint32(z_plane))
            h = quotient(q, uint32(z_width))
            top[v] = int32(h)
            left[v] = int32(q - h * uint32(z_width))
            read[v] = int32(b) * out_image
            write[v] = int32(int32(b) * z_image + int32(q))

        begin = int64(image) * channels + channel
        block_grad = advance(grad, begin * plane)
        block_z = advance(grad_z, (begin * tiles + first_tile) * z_plane)
        nothing = narrow(computed(0))
        for tile in range(int32(min(run, tiles - first_tile))):
            for v in range(count):
                sums[v] = computed(0)
            slot = uint32(table[begin_of + uint32(tile)])
            stop = uint32(table[begin_of + uint32(tile + 1)])
            while slot < stop:
                branch = advance(block_grad, int64(table[slot]) * batch * channels * plane)
                y = table[slot + uint32(1)]
                x = table[slot + uint32(2)]
                for v in range(count):  # all loads, then all sums: the loads overlap
                    values[v] = nothing
                    i = uint32(top[v] - y)  # a negative one is huge, and so is its quotient
                    j = uint32(left[v] - x)
                    h = quotient(i, uint32(stride_h))
                    w = quotient(j, uint32(stride_w))
                    whole = uint32(h * uint32(stride_h)) == i and uint32(w * uint32(stride_w)) == j
                    if whole and h < uint32(height) and w < uint32(width):
                        values[v] = branch[int32(read[v] + int32(h) * width + int32(w))]
                for v in range(count):
                    sums[v] += widen(values[v])
                slot = uint32(slot + uint32(3))
            for v in range(count):
                if int32(v * step) < ahead:
                    block_z[write[v]] = narrow(sums[v])
            block_z = advance(block_z, int64(z_plane))

    memory = types.CPointer(stored)
    signature = types.void(memory, types.CPointer(int32), memory, *[int32] * 17)
    return KernelSource(shift_add_backward, signature, (MAX_THREADS, RESIDENT_BLOCKS[dtype]))
