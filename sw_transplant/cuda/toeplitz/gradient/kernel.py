# mypy: disallow-untyped-defs=False
"""The kernel around the products of the weight gradient: tiles into shared memory, sums of diagonals out of it.

A thread block owns some lines of the kernels of one channel, and a chunk of the tiles of all images: `turns` times
`plan.planes` of them; or, of channels_last maps, of `plan.planes` channels, and `turns` tiles. Each turn stages tiles
of the map and of the gradient, and adds their products to sums that stay in registers. At the end every warp writes the
fragments of a line side by side, and the sums of their diagonals go to the workspace, (chunks, channels * taps)
float32, with all warps that share a line in a fixed order. Adding up the chunks is left to the caller. The same inputs
give the same bits.
"""

from typing import Any

from numba import cuda
from numba.cuda import types

from sw_transplant.cuda.intrinsics import advance, device_function, float32_from_bits, quotient
from sw_transplant.cuda.sources import KernelSource
from sw_transplant.cuda.toeplitz.gradient.plan import ROWS, GradientPlan
from sw_transplant.cuda.toeplitz.plan import MAX_KERNELS
from sw_transplant.cuda.toeplitz.staging import ALIGNMENT, raw_type, stage_pixels_of, stage_rows_of
from sw_transplant.cuda.toeplitz.words import block_afresh, thread_afresh

MOST_LOADS = 8  # of channels, under way at once: the sums of all lines stay in registers meanwhile

int32, uint32, int64, float32 = types.int32, types.uint32, types.int64, types.float32


def gradient_source(plan: GradientPlan, functions: Any = None) -> KernelSource:
    """The kernel of a plan.

    Args:
        plan: the geometry.
        functions: stands in for `emit.device_gradients(plan)` where there are no instructions to emit.
    """
    if functions is None:
        from sw_transplant.cuda.toeplitz.gradient.emit import device_gradients

        functions = device_gradients(plan)
    no_sums, add_products, spread_sums = functions
    kernels, taps, slots = len(plan.kernels), plan.taps, max(plan.lines)
    planes, plane_words, shares, together = plan.planes, plan.plane_words, plan.shares, plan.together
    threads, plane_threads, shared_words = plan.threads, 32 * plan.plane_warps, plan.shared_words
    parts, channels_last, block_channels = plan.parts, plan.channels_last, plan.channels
    sharing = plan.items * parts  # warps with the same lines of a channel
    scratch_pitch, scratch_words = plan.scratch_pitch, ROWS * plan.scratch_pitch
    tile_rows, tile_columns = plan.tile
    _, first_1, first_2, first_3 = (plan.first_group(min(i, kernels)) for i in range(MAX_KERNELS))
    stage_map = stage_rows_of([plan.map_copy], plan.map_area, plan.math, plan.vector, plane_threads)
    stage_grad = stage_rows_of([plan.grad_copy], plan.grad_area, plan.math, plan.vector, plane_threads)
    pixels = plan.math, plan.vector, planes, plane_words, threads, MOST_LOADS
    stage_map_pixels = stage_pixels_of([plan.map_copy], plan.map_area, *pixels)
    stage_grad_pixels = stage_pixels_of([plan.grad_copy], plan.grad_area, *pixels)

    @device_function
    def place_of_block(channels):
        """Chunk, first channel, and the first of the block's groups of lines."""
        block = uint32(block_afresh(cuda.blockIdx.x))
        above = quotient(block, uint32(shares))
        groups = quotient(uint32(channels + (block_channels - 1)), uint32(block_channels))
        chunk = quotient(above, groups)
        channel = int32(above - chunk * groups) * int32(block_channels)
        return int32(chunk), channel, int32(int32(block - above * uint32(shares)) * together)

    @device_function
    def seat_of_thread():
        """The thread's plane in the block, its number among those of the plane, and its warp's part and group."""
        thread = uint32(thread_afresh(cuda.threadIdx.x))
        mine = quotient(thread, uint32(plane_threads))
        in_plane = int32(thread - mine * uint32(plane_threads))
        part = quotient(uint32(in_plane >> 5), uint32(together))
        return int32(mine), in_plane, int32(part), int32(int32(in_plane >> 5) - int32(part) * together)

    @device_function
    def kernel_of_group(group):
        """Number of the kernel, and of the group among its own."""
        number, first = int32(0), int32(0)
        if kernels > 1 and group >= first_1:
            number, first = int32(1), int32(first_1)
        if kernels > 2 and group >= first_2:
            number, first = int32(2), int32(first_2)
        if kernels > 3 and group >= first_3:
            number, first = int32(3), int32(first_3)
        return number, int32(group - first)

    @device_function
    def place_of_item(item, tiles_down, tiles_across):
        """Image, and the tile's first row and column."""
        above = quotient(uint32(item), uint32(tiles_across))
        image = quotient(above, uint32(tiles_down))
        top = int32(int32(above - image * uint32(tiles_down)) * tile_rows)
        return int32(image), top, int32(int32(uint32(item) - above * uint32(tiles_across)) * tile_columns)

    @device_function
    def stage_in_rows(shared, x, grad, turn, items, channels, height, width, tiles_down, tiles_across, turns):
        chunk, channel, _ = place_of_block(channels)
        mine, in_plane, _, _ = seat_of_thread()
        item = int32((chunk * turns + turn) * planes + mine)
        if item < items:
            image, top, left = place_of_item(item, tiles_down, tiles_across)
            begin, plane = (int64(image) * channels + channel) * height * width, int32(mine * plane_words)
            stage_map(shared, plane, advance(x, begin), top, left, height, width, in_plane)
            stage_grad(shared, plane, advance(grad, begin), top, left, height, width, in_plane)

    @device_function
    def stage_in_pixels(shared, x, grad, turn, items, channels, height, width, tiles_down, tiles_across, turns):
        chunk, channel, _ = place_of_block(channels)
        thread, more = int32(thread_afresh(cuda.threadIdx.x)), int32(channels - channel)
        item = int32(chunk * turns + turn)
        if item < items:
            image, top, left = place_of_item(item, tiles_down, tiles_across)
            begin, at = int64(image) * height * width * channels + channel, int32(0)
            stage_map_pixels(shared, at, advance(x, begin), more, channels, top, left, height, width, thread)
            stage_grad_pixels(shared, at, advance(grad, begin), more, channels, top, left, height, width, thread)

    @device_function
    def item_in_rows(chunk, turns, turn, mine):
        return int32((chunk * turns + turn) * planes + mine)

    @device_function
    def item_in_pixels(chunk, turns, turn, mine):
        return int32(chunk * turns + turn)

    stage, item_of, firsts = stage_in_rows, item_in_rows, 0
    if channels_last:
        stage, item_of, firsts = stage_in_pixels, item_in_pixels, 1

    def give_line_of(number):
        kernel = plan.kernels[min(number, kernels - 1)]
        length, lines, mine = kernel.length, kernel.lines, plan.lines[min(number, kernels - 1)]
        tap_step, line_step = (kernel.size[1], 1) if kernel.axis == 0 else (1, kernel.size[1])
        before = sum(k.size[0] * k.size[1] for k in plan.kernels[:number])
        own, width = length * lines, 8 * len(plan.distances[min(number, kernels - 1)])
        first_column = plan.first_column(min(number, kernels - 1))

        @device_function
        def give_line(shared, out, scratch, chunk, channels, channel, group, slot, sharer, lane):
            line = int32(group * mine + slot)
            if slot < mine and line < lines and channel < channels:
                begin = int64(chunk) * channels * taps + int64(channels) * before + int64(channel) * own
                target = advance(out, begin + line * line_step)
                for tap in range(int32(lane + 32 * sharer), int32(length), int32(32 * sharing)):
                    total = float32(0)
                    for warp in range(sharing):
                        for row in range(ROWS):
                            column = int32(tap + row - first_column)
                            if column >= 0 and column < width:
                                at = int32(scratch + warp * (together * scratch_words) + row * scratch_pitch + column)
                                total = float32(total + float32_from_bits(shared[at]))
                    target[int32(tap * tap_step)] = total

        return give_line

    give_line_0, give_line_1, give_line_2, give_line_3 = map(give_line_of, range(MAX_KERNELS))

    def toeplitz_weight_grad(
        x, grad, out, items, channels, height, width, tiles_down, tiles_across, turns
    ):  # fmt: skip
        shared = cuda.shared.array(0, uint32, ALIGNMENT)
        for q in range(int32(cuda.threadIdx.x), int32(shared_words), int32(threads)):
            shared[q] = uint32(0)
        cuda.syncthreads()

        # Each step works out anew where it is: that is cheap, and the products need all registers there are.
        sums = no_sums(shared)
        turn = int32(0)
        while turn < turns:
            stage(shared, x, grad, turn, items, channels, height, width, tiles_down, tiles_across, turns)
            cuda.syncthreads()

            chunk, _, first_group = place_of_block(channels)
            mine, in_plane, part, group = seat_of_thread()
            if item_of(chunk, turns, turn, mine) < items:
                plane, group = int32(mine * plane_words), int32(first_group + group)
                sums = add_products(shared, sums, plane, int32(in_plane & 31), group, part)
            cuda.syncthreads()
            turn = int32(turn + 1)

        for slot in range(slots):
            chunk, channel, first_group = place_of_block(channels)
            mine, in_plane, part, seat = seat_of_thread()
            number, group = kernel_of_group(int32(first_group + seat))
            # Where the channel's fragments begin: of contiguous maps all planes are of one channel.
            scratch = int32(seat * scratch_words + mine * firsts * (parts * together * scratch_words))
            sharer, lane = int32(mine * (1 - firsts) * parts + part), int32(in_plane & 31)
            own = int32(scratch + sharer * (together * scratch_words))
            channel = int32(channel + mine * firsts)
            spread_sums(shared, sums, own, lane, int32(number * slots + slot))
            cuda.syncthreads()
            if number == 0:
                give_line_0(shared, out, scratch, chunk, channels, channel, group, slot, sharer, lane)
            if kernels > 1 and number == 1:
                give_line_1(shared, out, scratch, chunk, channels, channel, group, slot, sharer, lane)
            if kernels > 2 and number == 2:
                give_line_2(shared, out, scratch, chunk, channels, channel, group, slot, sharer, lane)
            if kernels > 3 and number == 3:
                give_line_3(shared, out, scratch, chunk, channels, channel, group, slot, sharer, lane)
            cuda.syncthreads()

    bits = types.CPointer(raw_type(plan.math))
    signature = types.void(bits, bits, types.CPointer(float32), *[int32] * 7)
    return KernelSource(toeplitz_weight_grad, signature, (threads, max(1, plan.most_resident)))
