# mypy: disallow-untyped-defs=False
"""The kernel around the products: the map and the taps into shared memory, the results out of it.

A thread block owns a tile of one channel, for `turns` groups of `plan.planes` images, so that the taps are staged once.
Each turn: its part of the map into shared memory, zeros around it; products into registers; sums through shared memory
to the output, where bias and residual are added. A channel's plane is addressed in 32 bits, its beginning in 64.
"""

from typing import Any

from numba import cuda
from numba.cuda import types

from sw_transplant.cuda.intrinsics import (
    SCALARS,
    advance,
    device_function,
    float32_from_bits,
    quotient,
)
from sw_transplant.cuda.sources import KernelSource
from sw_transplant.cuda.toeplitz.plan import IN_FLIGHT, MAX_KERNELS, TAP_MARGIN, Plan, line_words
from sw_transplant.cuda.toeplitz.staging import ALIGNMENT, DTYPES, arrange, raw_type, stage_map_of, word_of
from sw_transplant.cuda.toeplitz.words import block_afresh, thread_afresh

int32, uint32, int64, uint64, float32 = types.int32, types.uint32, types.int64, types.uint64, types.float32


def toeplitz_source(plan: Plan, has_bias: bool, residual: bool, functions: Any = None) -> KernelSource:
    """The kernel of a plan.

    Args:
        plan: the geometry.
        has_bias: a bias is added.
        residual: x is added, as it is, not rounded to TF32.
        functions: stands in for `emit.device_products(plan)` where there are no instructions to emit.
    """
    if functions is None:
        from sw_transplant.cuda.toeplitz.emit import device_products

        functions = device_products(plan)
    products, spread_sums = functions
    scalar = SCALARS[DTYPES[plan.math]]
    stored, widen, narrow = scalar.stored, scalar.widen, scalar.narrow
    raw, word, packed = raw_type(plan.math), word_of(plan.math), plan.packed
    kernels, copies = len(plan.kernels), list(dict.fromkeys(plan.copies.values()))
    two_copies = len(copies) == 2
    planes, plane_words = plan.planes, plan.plane_words
    threads, plane_threads = plan.threads, 32 * plan.parts
    taps_at = planes * plane_words
    (tile_rows, tile_columns), out_pitch = plan.step_out, plan.out_pitch
    out_across, out_down = arrange(plane_threads, tile_columns, tile_rows)
    out_chunks = -(-tile_columns // out_across)
    out_at_once = max(1, IN_FLIGHT // (2 * out_chunks))

    stage_first = stage_map_of(copies[0], plan.math, plane_threads)
    stage_second = stage_map_of(copies[-1], plan.math, plane_threads)

    def stage_taps_of(number):
        kernel = plan.kernels[min(number, kernels - 1)]
        length, lines, pitch = kernel.length, kernel.lines, line_words(kernel)
        tap_step, line_step = (kernel.size[1], 1) if kernel.axis == 0 else (1, kernel.size[1])
        begin, taps = taps_at + plan.first_tap(number), length * lines

        @device_function
        def stage_taps(shared, weight, channel, thread):
            source = advance(weight, int64(channel) * taps)
            for q in range(int32(thread), int32(lines * pitch), int32(threads)):
                line = int32(quotient(uint32(q), uint32(pitch)))
                tap = int32(q - line * pitch - TAP_MARGIN)
                low = raw(0)
                high = raw(0)
                if tap >= 0 and tap < length:
                    low = source[int32(tap * tap_step + line * line_step)]
                if packed and tap + 1 >= 0 and tap + 1 < length:
                    high = source[int32((tap + 1) * tap_step + line * line_step)]
                shared[uint32(begin + q)] = word(low, high)

        return stage_taps

    stage_taps_0, stage_taps_1, stage_taps_2, stage_taps_3 = map(stage_taps_of, range(MAX_KERNELS))

    @device_function
    def tile_of_block(channels, tiles_down, tiles_across):
        """Group of images, channel, and the tile's first row and column."""
        block = uint32(block_afresh(cuda.blockIdx.x))
        above = quotient(block, uint32(tiles_across))
        left = int32(block - above * uint32(tiles_across)) * int32(tile_columns)
        before = quotient(above, uint32(tiles_down))
        top = int32(above - before * uint32(tiles_down)) * int32(tile_rows)
        group = quotient(before, uint32(channels))
        channel = int32(before - group * uint32(channels))
        return int32(group), channel, int32(top), int32(left)

    @device_function
    def seat_of_thread():
        """Which plane of the block the thread works on, and its number among those that do."""
        thread = uint32(thread_afresh(cuda.threadIdx.x))
        mine = int32(quotient(thread, uint32(plane_threads)))
        return mine, int32(thread - uint32(mine * plane_threads))

    @device_function
    def give_results(shared, plane, x, bias, out, begin, channel, top, left, height, width, thread):
        given = advance(x, begin)
        target = advance(out, begin)
        shift = float32(0)
        if has_bias:
            shift = float32(widen(bias[channel]))
        my_row = int32(quotient(uint32(thread), uint32(out_across)))
        my_column = int32(thread - my_row * out_across)
        rows = int32(min(height - top, int32(tile_rows)))
        columns = int32(min(width - left, int32(tile_columns)))
        for first in range(my_row, rows, int32(out_down * out_at_once)):
            read = uint64(uint32(plane + first * out_pitch + my_column))
            for u in range(out_at_once):
                for k in range(out_chunks):
                    r = int32(first + u * out_down)
                    c = int32(my_column + k * out_across)
                    if r < rows and c < columns:
                        offset = uint64(u * out_down * out_pitch + k * out_across)
                        value = float32(float32_from_bits(shared[uint64(read + offset)]) + shift)
                        at = int32((top + r) * width + left + c)
                        if residual:
                            value += widen(given[at])
                        target[at] = narrow(value)

    def toeplitz_forward(
        x, x_bits, weight_0, weight_1, weight_2, weight_3, bias, out,
        batch, channels, height, width, tiles_down, tiles_across, turns,
    ):  # fmt: skip
        shared = cuda.shared.array(0, uint32, ALIGNMENT)
        thread = int32(cuda.threadIdx.x)
        _, channel, _, _ = tile_of_block(channels, tiles_down, tiles_across)
        stage_taps_0(shared, weight_0, channel, thread)
        if kernels > 1:
            stage_taps_1(shared, weight_1, channel, thread)
        if kernels > 2:
            stage_taps_2(shared, weight_2, channel, thread)
        if kernels > 3:
            stage_taps_3(shared, weight_3, channel, thread)

        # Each step of a turn works out anew where it is: that is cheap, and the products need all registers there are.
        turn = int32(0)
        while turn < turns:  # a range would keep a second count
            group, channel, top, left = tile_of_block(channels, tiles_down, tiles_across)
            mine, in_plane = seat_of_thread()
            image = int32((group * turns + turn) * planes + mine)
            plane = int32(mine * plane_words)
            if image < batch:
                source = advance(x_bits, (int64(image) * channels + channel) * height * width)
                stage_first(shared, plane, source, top, left, height, width, in_plane)
                if two_copies:
                    stage_second(shared, plane, source, top, left, height, width, in_plane)
            cuda.syncthreads()

            mine, in_plane = seat_of_thread()
            plane = int32(mine * plane_words)
            sums = products(shared, plane, int32(taps_at), int32(in_plane & 31), int32(in_plane >> 5))
            cuda.syncthreads()

            mine, in_plane = seat_of_thread()
            plane = int32(mine * plane_words)
            spread_sums(shared, sums, plane, int32(in_plane & 31), int32(in_plane >> 5))
            cuda.syncthreads()

            group, channel, top, left = tile_of_block(channels, tiles_down, tiles_across)
            mine, in_plane = seat_of_thread()
            image = int32((group * turns + turn) * planes + mine)
            plane = int32(mine * plane_words)
            if image < batch:
                begin = (int64(image) * channels + channel) * height * width
                give_results(shared, plane, x, bias, out, begin, channel, top, left, height, width, in_plane)
            cuda.syncthreads()
            turn = int32(turn + 1)

    memory, bits = types.CPointer(stored), types.CPointer(raw)
    signature = types.void(memory, *[bits] * 5, memory, memory, *[int32] * 7)
    blocks = max(1, 65536 // (plan.registers * threads))
    return KernelSource(toeplitz_forward, signature, (threads, blocks))
