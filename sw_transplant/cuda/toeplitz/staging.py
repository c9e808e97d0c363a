# mypy: disallow-untyped-defs=False
"""From global to shared memory: zero-padded copies of a map, as words that the products take.

A thread takes a run of 16 bytes of a row, or some channels of a pixel in a channels_last map: all loads of a few runs
first, then their stores, so that the loads overlap. The threads of a warp take neighbouring runs, row after row, so
that a line of the cache is fetched once. 16-bit values are fetched once for both copies that products may want: pairs
of neighbours in a row, and pairs of neighbours in a column, for which a thread takes two rows at a time.
"""

from collections.abc import Sequence

import torch
from numba.cuda import types

from sw_transplant.cuda.intrinsics import SIMULATOR, device_function, float32_bits, float32_from_bits, quotient
from sw_transplant.cuda.toeplitz.plan import IN_FLIGHT, Area, Copy, is_packed, unit
from sw_transplant.cuda.toeplitz.words import load_words_of, round_to_tf32, store_words_of

if SIMULATOR:
    from numba.cuda.simulator.kernelapi import FakeCUDALocal

    class cuda:
        """What the simulator puts in place of `numba.cuda`, but only in the module that has the kernel itself."""

        local = FakeCUDALocal()

else:
    from numba import cuda  # type: ignore[no-redef]

int32, uint32 = types.int32, types.uint32

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
    """The device function that makes a word of what is loaded. TF32 values are rounded here, once."""

    @device_function
    def rounded(word):
        return round_to_tf32(float32_from_bits(uint32(word)))

    @device_function
    def as_it_is(word):
        return uint32(word)

    return rounded if math == "tf32" else as_it_is


def bits_of_value(math: str):
    """The device function that gives the bits of a value as it is stored, as a word."""

    @device_function
    def bits_of_float(value):
        return float32_bits(value)

    @device_function
    def bits_of_half(value):
        return uint32(value)

    return bits_of_half if is_packed(math) else bits_of_float


@device_function
def lower_halves(first, second):
    """The lower 16 bits of two words, as one word."""
    return uint32(uint32(first) & uint32(0xFFFF)) | uint32(uint32(second) << uint32(16))


@device_function
def upper_halves(first, second):
    """The upper 16 bits of two words, as one word."""
    return uint32(uint32(first) >> uint32(16)) | uint32(uint32(second) & uint32(0xFFFF0000))


def load_vector_of(math: str, vector: int):
    """The device function (words, to, memory, index) that loads `vector` values, as whole words, into words[to], ..."""
    words = vector // 2 if is_packed(math) else vector
    load = load_words_of(max(1, words))

    @device_function
    def load_value(local, to, memory, index):
        local[to] = uint32(memory[index])

    @device_function
    def load_1(local, to, memory, index):
        (local[to],) = load(memory, index)

    @device_function
    def load_2(local, to, memory, index):
        local[to], local[to + 1] = load(memory, index)

    @device_function
    def load_4(local, to, memory, index):
        local[to], local[to + 1], local[to + 2], local[to + 3] = load(memory, index)

    return {0: load_value, 1: load_1, 2: load_2, 4: load_4}[words]


def stage_rows_of(copies: Sequence[Copy], area: Area, math: str, vector: int, threads: int):
    """The device function that fills copies of a contiguous map with an area of it, zeros where that is outside.

    Its arguments: shared memory, the word where the plane begins, the map of one channel, the tile's first row and
    column, the size of the map, and the number of the thread among `threads`.
    """
    packed, wide = is_packed(math), unit(math)
    down = max(copy.step[0] for copy in copies)
    across = -(-area.columns // wide)
    units = area.rows // down * across
    at_once = max(1, IN_FLIGHT // (4 * down))
    in_flight = 4 * down * at_once
    area_row, area_column = area.row, area.column
    load_vector, single = load_vector_of(math, vector), packed and vector == 1
    per_word = 2 if packed else 1
    stores = [store_of(copy, math, down) for copy in copies]
    store_first, store_second, two_copies = stores[0], stores[-1], len(stores) == 2

    @device_function
    def load_unit(words, to, source, row, x, inside, width):
        for k in range(0, wide, vector):
            if inside and uint32(int32(x + k)) < uint32(width):
                if single:
                    value = uint32(source[int32(row + x + k)])
                    words[to + k // 2] = uint32(words[to + k // 2] | uint32(value << uint32(16 * (k % 2))))
                else:
                    load_vector(words, to + k // per_word, source, int32(row + x + k))

    @device_function
    def stage_rows(shared, plane, source, top, left, height, width, thread):
        words = cuda.local.array(in_flight, uint32)
        for first in range(int32(thread), int32(units), int32(threads * at_once)):
            for u in range(at_once):
                number = uint32(first + u * threads)
                row = quotient(number, uint32(across))
                x = int32(left + area_column + int32(number - row * uint32(across)) * wide)
                for r in range(down):
                    to = (u * down + r) * 4
                    for i in range(4):
                        words[to + i] = uint32(0)
                    y = int32(top + area_row + int32(row) * down + r)
                    inside = uint32(y) < uint32(height) and number < uint32(units)
                    load_unit(words, to, source, int32(y * width), x, inside, width)
            for u in range(at_once):
                number = uint32(first + u * threads)
                if number < uint32(units):
                    row = quotient(number, uint32(across))
                    column = int32(area_column + int32(number - row * uint32(across)) * wide)
                    y = int32(area_row + int32(row) * down)
                    store_first(shared, plane, words, u * down * 4, y, column)
                    if two_copies:
                        store_second(shared, plane, words, u * down * 4, y, column)

    return stage_rows


def store_of(copy: Copy, math: str, down: int):
    """The device function that writes a run of a row, or of two, to a copy.

    Its arguments: shared memory, where the plane begins, the words of the run and where they begin, those of the second
    row 4 further on, and the row and the column of the run.
    """
    word, values, halving = word_of(math), copy.step[1], copy.step[1] - 1
    begin, row, column, rows, pitch = copy.first, copy.row, copy.column, copy.rows, copy.pitch
    # Where a copy does not begin with a run, its words lie at multiples of 8 bytes.
    chunk = 4 if column % unit(math) == 0 else 2
    store_two, store_four = store_words_of(2), store_words_of(4)
    store = store_four if chunk == 4 else store_two

    @device_function
    def store_rows(shared, plane, words, at, y, x):
        for r in range(down):
            i = int32(y + r - row)
            for k in range(0, 4, chunk):
                j = int32(x - column + k * values) >> halving
                if uint32(i) < uint32(rows) and uint32(j) < uint32(pitch):
                    first = at + 4 * r + k
                    third = first + chunk - 2
                    store(
                        shared, int32(plane + begin + i * pitch + j),
                        word(words[first]), word(words[first + 1]), word(words[third]), word(words[third + 1]),
                    )  # fmt: skip

    @device_function
    def store_pairs(shared, plane, words, at, y, x):
        i = int32(y - row) >> 1
        j = int32(x - column)
        if uint32(i) < uint32(rows) and uint32(j) < uint32(pitch):
            to = int32(plane + begin + i * pitch + j)
            for k in range(0, 4, 2):
                a, b = words[at + k], words[at + k + 1]
                c, d = words[at + k + 4], words[at + k + 5]
                store_four(
                    shared, int32(to + 2 * k),
                    lower_halves(a, c), upper_halves(a, c), lower_halves(b, d), upper_halves(b, d),
                )  # fmt: skip

    return store_pairs if copy.step[0] == 2 else store_rows


def stage_pixels_of(
    copies: Sequence[Copy],
    area: Area,
    math: str,
    vector: int,
    planes: int,
    plane_words: int,
    threads: int,
    most_loads: int = IN_FLIGHT,
):
    """The device function that fills copies of neighbouring channels of a channels_last map, a plane for each.

    A thread has up to `most_loads` loads under way, of single channels where these are odd in number; each has an
    address and a condition of its own, which take registers.

    Its arguments: shared memory, the word where the first plane begins, the image from its first channel on, how many
    channels there are from there on and from one pixel to the next, the tile's first row and column, the size of the
    map, and the number of the thread among `threads`.
    """
    packed = is_packed(math)
    down, wide = max(copy.step[0] for copy in copies), 2 if packed else 1
    across, per_pixel = -(-area.columns // wide), max(1, planes // vector)
    units = area.rows // down * across * per_pixel
    words_each = max(1, vector // 2) if packed else vector
    unit_words = down * wide * words_each
    at_once = max(1, min(IN_FLIGHT // unit_words, most_loads // (down * wide)))
    in_flight = unit_words * at_once
    area_row, area_column = area.row, area.column
    load_vector = load_vector_of(math, vector)
    stores = [store_pixels_of(copy, math, down, words_each) for copy in copies]
    store_first, store_second, two_copies = stores[0], stores[-1], len(stores) == 2

    @device_function
    def stage_pixels(shared, plane, source, channels, stride, top, left, height, width, thread):
        words = cuda.local.array(in_flight, uint32)
        for first in range(int32(thread), int32(units), int32(threads * at_once)):
            for u in range(at_once):
                number = uint32(first + u * threads)
                pixel = quotient(number, uint32(per_pixel))
                channel = int32(number - pixel * uint32(per_pixel)) * vector
                row = quotient(pixel, uint32(across))
                x = int32(left + area_column + int32(pixel - row * uint32(across)) * wide)
                y = int32(top + area_row + int32(row) * down)
                wanted = number < uint32(units) and channel < channels
                for r in range(down):
                    for c in range(wide):
                        to = u * unit_words + (r * wide + c) * words_each
                        for i in range(words_each):
                            words[to + i] = uint32(0)
                        if wanted and uint32(int32(y + r)) < uint32(height) and uint32(int32(x + c)) < uint32(width):
                            at = int32(int32(int32(y + r) * width + x + c) * stride + channel)
                            load_vector(words, to, source, at)
            for u in range(at_once):
                number = uint32(first + u * threads)
                if number < uint32(units):
                    pixel = quotient(number, uint32(per_pixel))
                    channel = int32(number - pixel * uint32(per_pixel)) * vector
                    row = quotient(pixel, uint32(across))
                    x = int32(area_column + int32(pixel - row * uint32(across)) * wide)
                    y = int32(area_row + int32(row) * down)
                    for i in range(vector):
                        to = int32(plane + int32(channel + i) * plane_words)
                        store_first(shared, to, words, u * unit_words, i, y, x)
                        if two_copies:
                            store_second(shared, to, words, u * unit_words, i, y, x)

    return stage_pixels


def store_pixels_of(copy: Copy, math: str, down: int, words_each: int):
    """The device function that writes the values of one channel of some pixels to its plane of a copy.

    Its arguments: shared memory, where the plane begins, the words of the pixels, row after row, and where they begin,
    the number of the channel in them, and the row and the column of the first pixel.
    """
    word, packed = word_of(math), is_packed(math)
    begin, row, column, rows, pitch = copy.first, copy.row, copy.column, copy.rows, copy.pitch

    @device_function
    def store_values(shared, plane, words, at, channel, y, x):
        i, j = int32(y - row), int32(x - column)
        if uint32(i) < uint32(rows) and uint32(j) < uint32(pitch):
            shared[uint32(plane + begin + i * pitch + j)] = word(words[at + channel])

    @device_function
    def halves(words, first, second, channel):
        if channel % 2 == 0:
            return lower_halves(words[first + channel // 2], words[second + channel // 2])
        return upper_halves(words[first + channel // 2], words[second + channel // 2])

    @device_function
    def store_neighbours(shared, plane, words, at, channel, y, x):
        for r in range(down):
            i, j = int32(y + r - row), int32(x - column) >> 1
            if uint32(i) < uint32(rows) and uint32(j) < uint32(pitch):
                first = at + 2 * r * words_each
                shared[uint32(plane + begin + i * pitch + j)] = halves(words, first, first + words_each, channel)

    @device_function
    def store_pairs(shared, plane, words, at, channel, y, x):
        i = int32(y - row) >> 1
        for c in range(2):
            j = int32(x + c - column)
            if uint32(i) < uint32(rows) and uint32(j) < uint32(pitch):
                first = at + c * words_each
                shared[uint32(plane + begin + i * pitch + j)] = halves(words, first, first + 2 * words_each, channel)

    if not packed:
        return store_values
    return store_pairs if copy.step[0] == 2 else store_neighbours


def clear_lead_of(copies: Sequence[Copy], threads: int):
    """The device function that writes the zeros before the first row of copies; arguments as of `stage_rows_of`."""
    leads = [copy for copy in copies if copy.lead]
    begins = tuple(copy.first - copy.lead for copy in leads) or (0,)
    counts = tuple(copy.lead for copy in leads) or (0,)
    first_begin, last_begin, first_count, last_count = begins[0], begins[-1], counts[0], counts[-1]

    @device_function
    def clear_lead(shared, plane, thread):
        for q in range(int32(thread), int32(first_count), int32(threads)):
            shared[uint32(plane + first_begin + q)] = uint32(0)
        for q in range(int32(thread), int32(last_count), int32(threads)):
            shared[uint32(plane + last_begin + q)] = uint32(0)

    return clear_lead
