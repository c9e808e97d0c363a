# mypy: disallow-untyped-defs=False
"""From shared to global memory: sums that lie row after row in place of the copy, with bias and the map itself added.

As in staging.py, a thread takes a run of a row, or some channels of a pixel, and writes them at once.
"""

from numba.cuda import types

from sw_transplant.cuda.intrinsics import (
    SCALARS,
    device_function,
    float32_bits,
    float32_from_bits,
    quotient,
)
from sw_transplant.cuda.toeplitz.plan import Plan, unit
from sw_transplant.cuda.toeplitz.staging import DTYPES, cuda, load_vector_of, raw_type
from sw_transplant.cuda.toeplitz.words import float16_bits, float16_from_bits, load_words_of, store_words_of

int32, uint32, float32 = types.int32, types.uint32, types.float32


def value_functions(math: str):
    """Two device functions: the float32 of a value's bits (uint32), and the bits of the value nearest to a float32."""
    scalar = SCALARS[DTYPES[math]]
    widen, narrow = scalar.widen, scalar.narrow

    @device_function
    def float32_value(bits):
        return float32_from_bits(uint32(bits))

    @device_function
    def float32_nearest(value):
        return float32_bits(float32(value))

    @device_function
    def float16_value(bits):
        return float32(widen(float16_from_bits(types.uint16(bits))))

    @device_function
    def float16_nearest(value):
        return uint32(float16_bits(narrow(value)))

    @device_function
    def bfloat16_value(bits):
        return float32(widen(types.uint16(bits)))

    @device_function
    def bfloat16_nearest(value):
        return uint32(narrow(value))

    if math == "float16":
        return float16_value, float16_nearest
    return (bfloat16_value, bfloat16_nearest) if math == "bfloat16" else (float32_value, float32_nearest)


def give_vector_of(plan: Plan, residual: bool):
    """The device function (sums, first, x, out, at) that rounds `plan.vector` sums from the first on and writes them, x
    added to each."""
    vector, packed = plan.vector, plan.packed
    words_each = vector // 2 if packed else vector
    single = words_each == 0
    load_vector, store = load_vector_of(plan.math, vector), store_words_of(max(1, words_each))
    value_of, nearest = value_functions(plan.math)
    raw = raw_type(plan.math)

    @device_function
    def give_vector(sums, first, x, out, at):
        words = cuda.local.array(4, uint32)
        for i in range(4):
            words[i] = uint32(0)
        if residual:
            load_vector(words, 0, x, at)
            for i in range(vector):
                if packed:
                    sums[first + i] += value_of(uint32(words[i // 2] >> uint32(16 * (i % 2))) & uint32(0xFFFF))
                else:
                    sums[first + i] += value_of(words[i])
        if single:
            out[at] = raw(nearest(sums[first]))
        else:
            for i in range(vector):
                if not packed:
                    words[i] = nearest(sums[first + i])
                elif i % 2 == 0:
                    words[i // 2] = nearest(sums[first + i])
                else:
                    words[i // 2] = uint32(words[i // 2] | uint32(nearest(sums[first + i]) << uint32(16)))
            store(out, at, words[0], words[1], words[2], words[3])

    return give_vector


def bias_of(plan: Plan, has_bias: bool):
    """The device function (bias, channel) -> what is added to a channel."""
    value_of, _ = value_functions(plan.math)
    packed = plan.packed

    @device_function
    def given(bias, channel):
        if packed:
            return value_of(uint32(bias[channel]))
        return float32(bias[channel])

    @device_function
    def nothing(bias, channel):
        return float32(0)

    return given if has_bias else nothing


def give_rows_of(plan: Plan, has_bias: bool, residual: bool):
    """The device function that writes the sums of a plane to a contiguous map.

    Its arguments: shared memory, the word where the plane begins, the map and the output of one channel, with the bias
    between them, the channel, the tile's first row and column, the size of the map, and the number of the thread.
    """
    tile_rows, tile_columns = plan.step_out
    threads, pitch, vector = 32 * plan.parts, plan.out_pitch, plan.vector
    across = -(-tile_columns // unit(plan.math))
    wide, units = unit(plan.math), tile_rows * across
    give_vector, shift_of, load_four = give_vector_of(plan, residual), bias_of(plan, has_bias), load_words_of(4)

    @device_function
    def give_rows(shared, plane, x, bias, out, channel, top, left, height, width, thread):
        shift = shift_of(bias, channel)
        sums = cuda.local.array(wide, float32)
        columns = int32(min(int32(width - left), int32(tile_columns)))
        for number in range(int32(thread), int32(units), int32(threads)):
            row = int32(quotient(uint32(number), uint32(across)))
            column = int32(number - row * across) * wide
            if top + row < height:
                at = int32(int32(top + row) * width + left + column)
                for k in range(0, wide, 4):
                    bits = load_four(shared, int32(plane + row * pitch + column + k))
                    for i in range(4):
                        sums[k + i] = float32(float32_from_bits(bits[i]) + shift)
                for k in range(0, wide, vector):
                    if column + k < columns:
                        give_vector(sums, k, x, out, int32(at + k))

    return give_rows


def give_pixels_of(plan: Plan, has_bias: bool, residual: bool):
    """The device function that writes the sums of all planes to a channels_last map.

    Its arguments: shared memory, the image and its output from the block's first channel on, with the bias between
    them, that channel and all channels, the tile's first row and column, the size of the map, and the thread's number.
    """
    tile_rows, tile_columns = plan.step_out
    threads, pitch, vector, plane_words = plan.threads, plan.out_pitch, plan.vector, plan.plane_words
    per_pixel = max(1, plan.planes // vector)
    units = tile_rows * tile_columns * per_pixel
    give_vector, shift_of = give_vector_of(plan, residual), bias_of(plan, has_bias)

    @device_function
    def give_pixels(shared, x, bias, out, channel, channels, top, left, height, width, thread):
        sums = cuda.local.array(vector, float32)
        for number in range(int32(thread), int32(units), int32(threads)):
            pixel = quotient(uint32(number), uint32(per_pixel))
            first = int32(uint32(number) - pixel * uint32(per_pixel)) * vector
            row = int32(quotient(pixel, uint32(tile_columns)))
            column = int32(pixel) - row * tile_columns
            if top + row < height and left + column < width and channel + first < channels:
                for i in range(vector):
                    bits = shared[uint32(int32(first + i) * plane_words + row * pitch + column)]
                    sums[i] = float32(float32_from_bits(bits) + shift_of(bias, int32(channel + first + i)))
                at = int32(int32(int32(top + row) * width + left + column) * channels + first)
                give_vector(sums, 0, x, out, at)

    return give_pixels
