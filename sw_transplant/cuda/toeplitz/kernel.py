# mypy: disallow-untyped-defs=False
"""The kernel around the products: the map and the taps into shared memory, the results out of it.

A thread block owns a tile of one channel, for `turns` groups of `plan.planes` images, so that the taps are staged once;
of channels_last maps, a tile of `plan.planes` channels, for `turns` images. Each turn: its part of the map into shared
memory, zeros around it; products into registers; sums through shared memory to the output (epilogue.py). A channel's
plane, or an image of channels_last maps, is addressed in 32 bits, its beginning in 64.
"""

from typing import Any

from numba import cuda
from numba.cuda import types

from sw_transplant.cuda.intrinsics import advance, device_function, quotient
from sw_transplant.cuda.sources import KernelSource
from sw_transplant.cuda.toeplitz.epilogue import give_pixels_of, give_rows_of
from sw_transplant.cuda.toeplitz.plan import MAX_KERNELS, TAP_MARGIN, Plan, line_words
from sw_transplant.cuda.toeplitz.staging import (
    ALIGNMENT,
    bits_of_value,
    clear_lead_of,
    lower_halves,
    raw_type,
    stage_pixels_of,
    stage_rows_of,
    word_of,
)
from sw_transplant.cuda.toeplitz.words import block_afresh, thread_afresh

int32, uint32, int64 = types.int32, types.uint32, types.int64


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
    raw, word, packed = raw_type(plan.math), word_of(plan.math), plan.packed
    kernels, copies = len(plan.kernels), list(dict.fromkeys(plan.copies.values()))
    planes, plane_words, seats, rounds = plan.planes, plan.plane_words, plan.seats, plan.rounds
    threads, plane_threads = plan.threads, 32 * plan.parts
    taps_at, tap_words = planes * plane_words, plan.tap_words
    block_channels, own_taps = plan.channels, tap_words if plan.channels_last else 0
    tile_rows, tile_columns = plan.step_out

    stage_rows = stage_rows_of(copies, plan.area, plan.math, plan.vector, plane_threads)
    stage_pixels = stage_pixels_of(copies, plan.area, plan.math, plan.vector, planes, plane_words, threads)
    clear_lead = clear_lead_of(copies, plane_threads)
    give_rows, give_pixels = give_rows_of(plan, has_bias, residual), give_pixels_of(plan, has_bias, residual)

    value_bits = bits_of_value(plan.math)

    def stage_taps_of(number):
        kernel = plan.kernels[min(number, kernels - 1)]
        length, lines, pitch = kernel.length, kernel.lines, line_words(kernel)
        tap_step, line_step = (kernel.size[1], 1) if kernel.axis == 0 else (1, kernel.size[1])
        begin, taps = taps_at + plan.first_tap(number), length * lines

        @device_function
        def stage_taps(shared, weight, channel, channels, thread):
            for mine in range(block_channels):
                if channel + mine < channels:
                    source = advance(weight, int64(channel + mine) * taps)
                    for q in range(int32(thread), int32(lines * pitch), int32(threads)):
                        line = int32(quotient(uint32(q), uint32(pitch)))
                        tap = int32(q - line * pitch - TAP_MARGIN)
                        low = uint32(0)
                        high = uint32(0)
                        if tap >= 0 and tap < length:
                            low = value_bits(source[int32(tap * tap_step + line * line_step)])
                        if packed and tap + 1 >= 0 and tap + 1 < length:
                            high = value_bits(source[int32((tap + 1) * tap_step + line * line_step)])
                        shared[uint32(begin + mine * tap_words + q)] = lower_halves(low, high) if packed else word(low)

        return stage_taps

    stage_taps_0, stage_taps_1, stage_taps_2, stage_taps_3 = map(stage_taps_of, range(MAX_KERNELS))

    @device_function
    def seat_of_thread():
        """Which of the planes that are worked on at once is the thread's, and its number among those of the plane."""
        thread = uint32(thread_afresh(cuda.threadIdx.x))
        mine = int32(quotient(thread, uint32(plane_threads)))
        return mine, int32(thread - uint32(mine * plane_threads))

    @device_function
    def tile_of(number, tiles_down, tiles_across):
        """What is beyond the tiles of a map in a number, and the first row and column of the tile."""
        above = quotient(number, uint32(tiles_across))
        left = int32(number - above * uint32(tiles_across)) * int32(tile_columns)
        before = quotient(above, uint32(tiles_down))
        return before, int32(above - before * uint32(tiles_down)) * int32(tile_rows), int32(left)

    # Contiguous maps: neighbouring blocks have tiles of one map, whose halos overlap.

    @device_function
    def place_in_rows(channels, tiles_down, tiles_across):
        """Group of images, channel, and the tile's first row and column."""
        before, top, left = tile_of(uint32(block_afresh(cuda.blockIdx.x)), tiles_down, tiles_across)
        group = quotient(before, uint32(channels))
        return int32(group), int32(before - group * uint32(channels)), top, left

    @device_function
    def stage_in_rows(shared, x, turn, batch, channels, height, width, tiles_down, tiles_across, turns):
        group, channel, top, left = place_in_rows(channels, tiles_down, tiles_across)
        mine, in_plane = seat_of_thread()
        image = int32((group * turns + turn) * planes + mine)
        if image < batch:
            source = advance(x, (int64(image) * channels + channel) * height * width)
            stage_rows(shared, int32(mine * plane_words), source, top, left, height, width, in_plane)
            clear_lead(shared, int32(mine * plane_words), in_plane)

    @device_function
    def give_in_rows(shared, x, bias, out, turn, batch, channels, height, width, tiles_down, tiles_across, turns):
        group, channel, top, left = place_in_rows(channels, tiles_down, tiles_across)
        mine, in_plane = seat_of_thread()
        image = int32((group * turns + turn) * planes + mine)
        if image < batch:
            begin = (int64(image) * channels + channel) * height * width
            given, target = advance(x, begin), advance(out, begin)
            plane = int32(mine * plane_words)
            give_rows(shared, plane, given, bias, target, channel, top, left, height, width, in_plane)

    # channels_last maps: neighbouring blocks have channels of the same pixels, in the same lines of the cache.

    @device_function
    def place_in_pixels(channels, tiles_down, tiles_across):
        """Group of images, first channel, and the tile's first row and column."""
        block = uint32(block_afresh(cuda.blockIdx.x))
        groups = quotient(uint32(channels + (planes - 1)), uint32(planes))
        others = quotient(block, groups)
        before, top, left = tile_of(others, tiles_down, tiles_across)
        return int32(before), int32(block - others * groups) * int32(planes), top, left

    @device_function
    def stage_in_pixels(shared, x, turn, batch, channels, height, width, tiles_down, tiles_across, turns):
        group, channel, top, left = place_in_pixels(channels, tiles_down, tiles_across)
        image = int32(group * turns + turn)
        if image < batch:
            source = advance(x, int64(image) * height * width * channels + channel)
            thread, more = int32(thread_afresh(cuda.threadIdx.x)), int32(channels - channel)
            stage_pixels(shared, int32(0), source, more, channels, top, left, height, width, thread)
            mine, in_plane = seat_of_thread()
            for plane in range(int32(mine), int32(planes), int32(seats)):
                clear_lead(shared, int32(plane * plane_words), in_plane)

    @device_function
    def give_in_pixels(shared, x, bias, out, turn, batch, channels, height, width, tiles_down, tiles_across, turns):
        group, channel, top, left = place_in_pixels(channels, tiles_down, tiles_across)
        image = int32(group * turns + turn)
        if image < batch:
            begin = int64(image) * height * width * channels + channel
            given, target = advance(x, begin), advance(out, begin)
            thread = int32(thread_afresh(cuda.threadIdx.x))
            give_pixels(shared, given, bias, target, channel, channels, top, left, height, width, thread)

    place, stage, give = place_in_rows, stage_in_rows, give_in_rows
    if plan.channels_last:
        place, stage, give = place_in_pixels, stage_in_pixels, give_in_pixels

    def toeplitz_forward(
        x, weight_0, weight_1, weight_2, weight_3, bias, out,
        batch, channels, height, width, tiles_down, tiles_across, turns,
    ):  # fmt: skip
        shared = cuda.shared.array(0, uint32, ALIGNMENT)
        thread = int32(cuda.threadIdx.x)
        _, channel, _, _ = place(channels, tiles_down, tiles_across)
        stage_taps_0(shared, weight_0, channel, channels, thread)
        if kernels > 1:
            stage_taps_1(shared, weight_1, channel, channels, thread)
        if kernels > 2:
            stage_taps_2(shared, weight_2, channel, channels, thread)
        if kernels > 3:
            stage_taps_3(shared, weight_3, channel, channels, thread)

        # Each step of a turn works out anew where it is: that is cheap, and the products need all registers there are.
        turn = int32(0)
        while turn < turns:  # a range would keep a second count
            stage(shared, x, turn, batch, channels, height, width, tiles_down, tiles_across, turns)
            cuda.syncthreads()

            for turn_of_seat in range(rounds):  # a warp's planes, one after the other
                mine, in_plane = seat_of_thread()
                own = int32(turn_of_seat * seats + mine)
                plane, taps = int32(own * plane_words), int32(taps_at + own * own_taps)
                sums = products(shared, plane, taps, int32(in_plane & 31), int32(in_plane >> 5))
                cuda.syncthreads()

                mine, in_plane = seat_of_thread()
                plane = int32(int32(turn_of_seat * seats + mine) * plane_words)
                spread_sums(shared, sums, plane, int32(in_plane & 31), int32(in_plane >> 5))
            cuda.syncthreads()

            give(shared, x, bias, out, turn, batch, channels, height, width, tiles_down, tiles_across, turns)
            cuda.syncthreads()
            turn = int32(turn + 1)

    memory = types.CPointer(raw)
    signature = types.void(*[memory] * 7, *[int32] * 7)
    blocks = max(1, 65536 // (plan.registers * threads))
    return KernelSource(toeplitz_forward, signature, (threads, blocks))
