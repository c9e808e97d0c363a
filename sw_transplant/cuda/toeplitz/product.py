"""The products of one warp, written once for every way to run or count them.

`multiply` is a straight list of loads and matrix products whose addresses differ by constants. It is written against
`ops`, which is what gives the words a meaning: `emit.Emitter` turns each into an instruction (the loops here are then
unrolled by Python), a count gives the cost of a plan, and the tests run all lanes of a warp in lockstep with NumPy.
Indices are anything with + - * >> &: a constant, an LLVM value, an array with one element for each lane.

Fragments (docs/design/toeplitz.md draws them), in words, with g = lane >> 2 and t = lane & 3:
A (16 x 8 words): a0 (g, t), a1 (g+8, t), a2 (g, t+4), a3 (g+8, t+4); B (8 words x 8): b0 (t, g), b1 (t+4, g);
C (16 x 8): c0 (g, 2t), c1 (g, 2t+1), c2 (g+8, 2t), c3 (g+8, 2t+1).
"""

from typing import Any

from sw_transplant.cuda.toeplitz.plan import TAP_MARGIN, Kernel, Plan, line_words
from sw_transplant.cuda.toeplitz.tally import Tally


def multiply(ops: Any, plan: Plan, plane: Any, taps: Any, lane: Any, part: Any) -> list[Any]:
    """All products of one warp.

    Args:
        ops: see above.
        plan: the geometry.
        plane, taps: words of shared memory where the warp's plane and the lines of taps begin.
        lane: 0 .. 31.
        part: the warp's place in its tile, 0 .. plan.parts - 1.

    Returns:
        The C fragments: 4 sums for each group of 8 columns of each block of 16 rows.
    """
    sums = [ops.nothing() for _ in range(4 * plan.columns * plan.blocks)]
    for number, kernel in enumerate(plan.kernels):
        lines = taps + (plan.first_tap(number) + TAP_MARGIN)
        run = _along_columns if kernel.axis == 1 else _along_rows
        sums = run(ops, plan, kernel, sums, plane, lines, lane, part)
    return sums


def spread(ops: Any, plan: Plan, sums: list[Any], plane: Any, lane: Any, part: Any) -> None:
    """Write the sums to the beginning of the plane, row after row."""
    pitch = plan.out_pitch
    at = plane + (lane >> 2) * pitch + (lane & 3) * 2 + part * (16 * plan.blocks * pitch)
    for m in range(plan.blocks):
        for n in range(plan.columns):
            first = 4 * (m * plan.columns + n)
            for half in range(2):
                ops.store_pair(
                    at, (16 * m + 8 * half) * pitch + 8 * n, sums[first + 2 * half], sums[first + 2 * half + 1]
                )


class _Line:
    """The Toeplitz matrix of one line of taps: fragments depend on (contracted - output position), so few serve all.

    Slot (t, j) of a step is word t + 4j of it; along the rows of a map of TF32 values it is 2t + j instead, which
    spreads the rows of a fragment over all banks whatever the pitch is. Sums do not mind the order.
    """

    def __init__(self, ops: Any, plan: Plan, kernel: Kernel, at: Any) -> None:
        self.ops, self.kernel, self.at = ops, kernel, at
        self.apart = slot_distance(plan, kernel.axis)
        self.last_of_lanes = 7 if plan.packed else 6 if kernel.axis == 0 else 3
        self.start = plan.origins[kernel.axis] + kernel.origin[kernel.axis]
        self.words: dict[int, Any] = {}

    def touches(self, offset: int) -> bool:
        """Whether a lane has a tap at this distance of contracted from output position (without the lane's part)."""
        return -self.last_of_lanes <= offset + self.start < self.kernel.length + 7

    def pair(self, offset: int) -> list[Any] | None:
        """The words of both slots, or None where they are all zero."""
        offsets = (offset, offset + self.apart)
        return [self._word(o) for o in offsets] if any(map(self.touches, offsets)) else None

    def _word(self, offset: int) -> Any:
        if not self.touches(offset):
            return self.ops.no_operand()
        if offset not in self.words:
            self.words[offset] = self.ops.load(self.at, offset + self.start)
        return self.words[offset]


def slot_distance(plan: Plan, axis: int) -> int:
    """Contracted positions from slot (t, 0) to slot (t, 1)."""
    return 8 if plan.packed else 1 if axis == 0 else 4


def _sums_with(ops, plan, a, b, sums):
    """Sums with a product added.

    Tensor cores cut what is below the last bit of a sum, always towards zero. Where the result shall have the accuracy
    of float32, each product therefore begins at zero, and is added with rounding.
    """
    if plan.math == "tf32x3":
        return ops.add(sums, ops.mma(a, b, [ops.nothing()] * 4))
    return ops.mma(a, b, sums)


def _along_columns(ops, plan, kernel, sums, plane, lines, lane, part):
    """Rows of the map (A) times a Toeplitz matrix (B): a line of the kernel is one of its rows."""
    copy, pitch = plan.copies[1], plan.copies[1].pitch
    begin = copy.first + (plan.origins[1] - copy.column) // copy.step[1] - (kernel.origin[0] + copy.row) * pitch
    # Each lane gives the address of 4 words: rows 0 to 15 of the first half of a step, then of the second.
    first_row = plane + begin + (lane & 15) * pitch + (lane >> 4) * 4 + part * (16 * plan.blocks * pitch)
    first_line = lines + (lane & 3) * (2 if plan.packed else 1) - (lane >> 2)

    def line(number, sums):
        sums = list(sums)
        matrix = _Line(ops, plan, kernel, first_line + number * line_words(kernel))
        rows = first_row + number * pitch
        for step in range(plan.steps(1)):
            band = [(n, matrix.pair(plan.depth * step - 8 * n)) for n in range(plan.columns)]
            band = [(n, b) for n, b in band if b is not None]
            for m in range(plan.blocks if band else 0):
                a = ops.load_matrix(rows, 16 * m * pitch + 8 * step)
                for n, b in band:
                    first = 4 * (m * plan.columns + n)
                    sums[first : first + 4] = _sums_with(ops, plan, a, b, sums[first : first + 4])
        return sums

    return ops.repeat(kernel.lines, line, sums)


def _along_rows(ops, plan, kernel, sums, plane, lines, lane, part):
    """A Toeplitz matrix (A) times columns of the map (B): a line of the kernel is one of its columns."""
    copy, pitch = plan.copies[0], plan.copies[0].pitch
    g, t = lane >> 2, lane & 3
    begin = copy.first + (plan.origins[0] - copy.row) // copy.step[0] * pitch - (kernel.origin[1] + copy.column)
    first_line = lines + t * 2 - g
    slot_rows, slot_pitch = (1, 4 * pitch) if plan.packed else (2, pitch)
    first_column = plane + begin + g + t * (slot_rows * pitch)
    if plan.whole[0] is None:  # each warp contracts rows around its own, all with the same band
        first_column = first_column + part * (16 * plan.blocks // copy.step[0] * pitch)

    def variant(first_output):
        """The product for a warp whose first output row is this far from where the steps begin to count."""

        def line(number, sums):
            sums = list(sums)
            matrix = _Line(ops, plan, kernel, first_line + number * line_words(kernel))
            columns = first_column + number
            for step in range(plan.steps(0)):
                band = []
                for m in range(plan.blocks):
                    offset = plan.depth * step - first_output - 16 * m
                    upper, lower = matrix.pair(offset), matrix.pair(offset - 8)
                    if upper is not None or lower is not None:
                        zeros = [ops.no_operand(), ops.no_operand()]
                        (a0, a2), (a1, a3) = upper or zeros, lower or zeros
                        band.append((m, [a0, a1, a2, a3]))
                for n in range(plan.columns if band else 0):
                    at = 8 * step * pitch + 8 * n
                    b = [ops.load(columns, at), ops.load(columns, at + slot_pitch)]
                    for m, a in band:
                        first = 4 * (m * plan.columns + n)
                        sums[first : first + 4] = _sums_with(ops, plan, a, b, sums[first : first + 4])
            return sums

        return lambda: ops.repeat(kernel.lines, line, sums)

    if plan.whole[0] is None:
        return variant(0)()
    # All warps contract the same rows, those of the map, each with a band of its own.
    return ops.choose(part, [variant(16 * plan.blocks * p) for p in range(plan.parts)])


def count(plan: Plan) -> Tally:
    """What `multiply` does for one plane, all of its warps together."""
    tally = Tally(plan.parts)
    multiply(tally, plan, 0, 0, 0, 0)
    return tally
