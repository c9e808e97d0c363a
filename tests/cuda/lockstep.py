"""The `ops` of the Toeplitz products for a whole warp at once: every value is a NumPy array with one element per lane.

What PTX documents for its fragments, written out: which lane holds which element. The package's own `multiply` and
`spread` run on it.
"""

import numpy as np

LANES = np.arange(32)
ROW, WORD = LANES >> 2, LANES & 3


class Lockstep:
    """memory: the uint32 words of shared memory; math as in `Plan`."""

    def __init__(self, memory, math):
        self.memory, self.math = memory, math

    def nothing(self):
        return np.zeros(32, np.float32)

    def no_operand(self):
        return np.zeros(32, np.uint32)

    def load(self, at, offset):
        index = np.broadcast_to(at + offset, 32)
        assert 0 <= index.min()
        assert index.max() < len(self.memory), (index.max(), len(self.memory))
        return self.memory[index]

    def load_matrix(self, at, offset, count=4, transposed=False):
        """ldmatrix: lane 8 i + r gives the address of row r of matrix i; lane l gets word l & 3 of row l >> 2."""
        address = np.broadcast_to(at + offset, 32)[: 8 * count]
        assert (address % 4 == 0).all(), "rows of a matrix begin at multiples of 16 bytes"
        matrices = [self.load(address[8 * i + ROW] + WORD, 0) for i in range(count)]
        return [transpose(words) for words in matrices] if transposed else matrices

    def splice(self, first, second):
        return (first >> 16) | (second << 16)

    def mma(self, a, b, c):
        values = 2 if self.math in ("float16", "bfloat16") else 1
        left, right = np.empty((16, 8, values)), np.empty((8, 8, values))  # (row, word), (word, column)
        for i in range(4):
            left[ROW + 8 * (i % 2), WORD + 4 * (i // 2)] = self._values(a[i])
        for i in range(2):
            right[WORD + 4 * i, ROW] = self._values(b[i])
        product = np.einsum("rkv,kcv->rc", left, right)
        return [self.sum(c[i], product[ROW + 8 * (i // 2), 2 * WORD + i % 2]) for i in range(4)]

    def add(self, first, second):
        return [a + b for a, b in zip(first, second, strict=True)]

    def sum(self, before, product):
        """What is added to sums of float32, in float64; rounded."""
        return (before + product.astype(np.float32)).astype(np.float32)

    def repeat(self, times, body, state, first=0, by=1):
        numbers = range(of_warp(first), times, by)
        assert numbers, "the loop tests for its end after the first turn"
        for number in numbers:
            state = body(number, state)
        return state

    def choose(self, which, variants, table=None):
        return variants[of_warp(which) if table is None else table[of_warp(which)]]()

    def store_pair(self, at, offset, first, second):
        assert ((at + offset) % 2 == 0).all()
        self.memory[at + offset] = first.view(np.uint32)
        self.memory[at + offset + 1] = second.view(np.uint32)

    def _values(self, words):
        """(32,) words -> (32, values of a word) in float64."""
        if self.math == "tf32":  # the hardware does not look at the other bits, rounded or not
            return (words & 0xFFFFE000).view(np.float32).astype(np.float64)[:, None]
        if self.math == "tf32x3":  # three products of split operands, all but exact
            return words.view(np.float32).astype(np.float64)[:, None]
        halves = np.stack([words & 0xFFFF, words >> 16], axis=1).astype(np.uint16)  # the lower half comes first
        if self.math == "float16":
            return halves.view(np.float16).astype(np.float64)
        return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


class Cutting(Lockstep):
    """Adds as tensor cores may: what is beyond the last bit of a sum is cut off, whatever its sign."""

    def add(self, first, second):
        return [a + b for a, b in zip(first, second, strict=True)]

    def sum(self, before, product):
        exact = before.astype(np.float64) + product
        nearest = exact.astype(np.float32)
        beyond = np.abs(nearest) > np.abs(exact)
        return np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)


def of_warp(value):
    """The number that all lanes of a warp have."""
    (only,) = set(np.broadcast_to(value, 32).tolist())
    return only


def transpose(words):
    """8 x 8 values of 16 bits, as words of all lanes."""
    values = np.ascontiguousarray(words.astype(np.uint32)).view(np.uint16).reshape(8, 8)
    return np.ascontiguousarray(values.T).view(np.uint32).reshape(32)
