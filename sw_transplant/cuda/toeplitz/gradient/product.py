"""The products of one warp of the weight gradient, written once for every way to run or count them.

As in `toeplitz.product`, whose page explains `ops`, fragments and lanes. In a product the gradient is A (16 positions
along the lines, times what is summed over) and the map is B (what is summed over, times 8 positions along the lines).
A fragment of the gradient serves all lines and all distances; one of the map serves all blocks of the gradient.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from sw_transplant.cuda.toeplitz.gradient.plan import COLUMNS, ROWS, GradientPlan, Variant
from sw_transplant.cuda.toeplitz.tally import Tally


def multiply(ops: Any, plan: GradientPlan, sums: list[Any], plane: Any, lane: Any, group: Any, part: Any) -> list[Any]:
    """Add all products of one warp to its sums.

    Args:
        ops: see `toeplitz.product`.
        plan: the geometry.
        sums: `plan.sums` of them: 4 for each distance of each line.
        plane: word of shared memory where the warp's plane begins.
        lane: 0 .. 31.
        group: which lines; groups from len(plan.groups) on have none.
        part: the warp's place among those that share the steps.

    Returns:
        The new sums.
    """
    variants: list[Callable[[], list[Any]]] = [
        functools.partial(_add_products, ops, plan, variant, sums, plane, lane, group, part)
        for variant in plan.variants
    ]
    table = list(plan.variant_of_group)
    idle = plan.shares * plan.together - len(table)
    if idle:
        table += [len(variants)] * idle
        variants.append(lambda: sums)
    return ops.choose(group, variants, table)


def spread(ops: Any, plan: GradientPlan, sums: list[Any], scratch: Any, lane: Any, which: Any) -> None:
    """Write the fragments of one line side by side: 16 rows.

    Args:
        ops, plan, lane: as in `multiply`.
        sums: what `multiply` gave.
        scratch: word of shared memory to begin at.
        which: number of the kernel * max(plan.lines) + line of the warp.
    """
    pitch = plan.scratch_pitch
    at = scratch + (lane >> 2) * pitch + (lane & 3) * 2

    def line(number: int, slot: int) -> list[Any]:
        distances = len(plan.distances[number])
        for d in range(distances if slot < plan.lines[number] else 0):
            first = 4 * (slot * distances + d)
            for half in range(2):
                ops.store_pair(at, 8 * half * pitch + COLUMNS * d, sums[first + 2 * half], sums[first + 2 * half + 1])
        return []

    slots = max(plan.lines)
    ops.choose(which, [functools.partial(line, w // slots, w % slots) for w in range(len(plan.kernels) * slots)])


def _add_products(
    ops: Any,
    plan: GradientPlan,
    variant: Variant,
    sums: list[Any],
    plane: Any,
    lane: Any,
    group: Any,
    part: Any,
) -> list[Any]:
    number = variant.kernel
    axis = plan.kernels[number].axis
    first_line = (group - plan.first_group(number)) * plan.lines[number]
    operands_of = _AlongColumns if axis == 0 else _PackedAlongRows if plan.packed else _AlongRows
    operands = operands_of(ops, plan, variant, plane, lane, first_line)
    distances = plan.distances[number]
    used = 4 * variant.lines * len(distances)

    def step(position: Any, state: list[Any]) -> list[Any]:
        state = list(state)
        operands.begin(position)
        for n, met in plan.bands[number]:
            for line in range(variant.lines):
                b = operands.of_map(n, line)
                for m in met:
                    at = 4 * (line * len(distances) + n - 2 * m - distances.start)
                    state[at : at + 4] = ops.mma(operands.of_grad(m), b, state[at : at + 4])
        return state

    # The hardware truncates what it adds to a sum, always towards zero. Where the result shall have the accuracy of
    # float32, sums are therefore short, of one plane, and added up with rounding.
    afresh = plan.math == "tf32x3"
    begin = [ops.nothing()] * used if afresh else list(sums[:used])
    result = ops.repeat(plan.steps(axis), step, begin, part, plan.parts)
    return [*(ops.add(sums[:used], result) if afresh else result), *sums[used:]]


class _Operands(ABC):
    """Fragments of one step. Each is loaded where it is first used."""

    def __init__(self, ops: Any, plan: GradientPlan, variant: Variant, plane: Any, lane: Any, first_line: Any) -> None:
        self.ops, self.plan, self.variant = ops, plan, variant
        self.kernel = plan.kernels[variant.kernel]
        self.grad_pitch, self.map_pitch = plan.grad_copy.pitch, plan.map_copy.pitch
        self.grad_start = plane + plan.grad_copy.first
        self.map_start = plane + plan.map_copy.first
        self.grad_lane, self.map_lane = self.addresses(lane, first_line)

    step_words: tuple[int, int]  # from one step to the next, in the copies of the gradient and of the map

    @abstractmethod
    def addresses(self, lane: Any, first_line: Any) -> tuple[Any, Any]:
        """Where the lane reads: block 0 of the gradient, and block 0 of the map for the first line, in step 0."""

    @abstractmethod
    def load_grad(self, m: int) -> list[Any]:
        """The fragment of block m of the gradient."""

    @abstractmethod
    def of_map(self, n: int, line: int) -> list[Any]:
        """The fragment of block n of the map for a line."""

    def begin(self, position: Any) -> None:
        """Forget the fragments of the step before."""
        self.grad_at = self.grad_lane + position * self.step_words[0]
        self.map_at = self.map_lane + position * self.step_words[1]
        self.grads: dict[int, list[Any]] = {}
        self.words: dict[tuple[int, int], Any] = {}

    def of_grad(self, m: int) -> list[Any]:
        if m not in self.grads:
            self.grads[m] = self.load_grad(m)
        return self.grads[m]


class _AlongColumns(_Operands):
    """Lines along axis 0: sums over w, along the rows of both copies. Slot (t, j) of a step is word t + 4j of it.

    A line begins j columns further right than the first. If that is an odd number of 16-bit values, a word is spliced
    of two neighbours, which the lines beside it need anyway.
    """

    step_words = (8, 8)

    def addresses(self, lane: Any, first_line: Any) -> tuple[Any, Any]:
        copy, kernel = self.plan.map_copy, self.kernel
        column = first_line + (-kernel.origin[1] - copy.column)
        word = column >> 1 if self.plan.packed else column
        row = -self.plan.lead(self.variant.kernel) - copy.row
        of_map = self.map_start + ((lane >> 2) + row) * self.map_pitch + (lane & 3) + word
        return self.grad_start + (lane & 15) * self.grad_pitch + (lane >> 4) * 4, of_map

    def load_grad(self, m: int) -> list[Any]:
        return self.ops.load_matrix(self.grad_at, ROWS * m * self.grad_pitch)

    def of_map(self, n: int, line: int) -> list[Any]:
        if not self.plan.packed:
            return [self._word(n, line), self._word(n, line + 4)]
        word, odd = divmod(line + self.variant.parity, 2)
        slots = (word, word + 4)
        if not odd:
            return [self._word(n, slot) for slot in slots]
        return [self.ops.splice(self._word(n, slot), self._word(n, slot + 1)) for slot in slots]

    def _word(self, n: int, offset: int) -> Any:
        if (n, offset) not in self.words:
            self.words[n, offset] = self.ops.load(self.map_at, COLUMNS * n * self.map_pitch + offset)
        return self.words[n, offset]


class _AlongRows(_Operands):
    """Lines along axis 1, of TF32 values: sums over h, across the rows of both copies. Slot (t, j) is row 2t + j.

    Rows 2t apart hit different banks whatever the pitch is, and neighbouring lines share words.
    """

    def addresses(self, lane: Any, first_line: Any) -> tuple[Any, Any]:
        copy, kernel = self.plan.map_copy, self.kernel
        self.step_words = 8 * self.grad_pitch, 8 * self.map_pitch
        g, t = lane >> 2, lane & 3
        row = first_line + (-kernel.origin[0] - copy.row) + t * 2
        column = -self.plan.lead(self.variant.kernel) - copy.column
        return self.grad_start + t * (2 * self.grad_pitch) + g, self.map_start + row * self.map_pitch + g + column

    def load_grad(self, m: int) -> list[Any]:
        offsets = (0, 8, self.grad_pitch, self.grad_pitch + 8)
        return [self.ops.load(self.grad_at, ROWS * m + offset) for offset in offsets]

    def of_map(self, n: int, line: int) -> list[Any]:
        return [self._word(n, line), self._word(n, line + 1)]

    def _word(self, n: int, row: int) -> Any:
        if (n, row) not in self.words:
            self.words[n, row] = self.ops.load(self.map_at, COLUMNS * n + row * self.map_pitch)
        return self.words[n, row]


class _PackedAlongRows(_Operands):
    """Lines along axis 1, of 16-bit values: matrices are transposed as they are loaded, so that rows become words.

    A line that begins an odd number of rows below the first is spliced of the fragments of its neighbours.
    """

    def addresses(self, lane: Any, first_line: Any) -> tuple[Any, Any]:
        copy, kernel = self.plan.map_copy, self.kernel
        self.step_words = 16 * self.grad_pitch, 16 * self.map_pitch
        row = first_line + (-kernel.origin[0] - copy.row) + (lane & 15)
        word = (-self.plan.lead(self.variant.kernel) - copy.column) // 2
        grad_row = (lane & 7) + (lane >> 4) * 8
        of_grad = self.grad_start + grad_row * self.grad_pitch + ((lane >> 3) & 1) * 4
        return of_grad, self.map_start + row * self.map_pitch + word

    def load_grad(self, m: int) -> list[Any]:
        return self.ops.load_matrix(self.grad_at, ROWS // 2 * m, transposed=True)

    def of_map(self, n: int, line: int) -> list[Any]:
        if line % 2 == 0 or line + 1 == self.variant.lines:
            return self._fragment(n, line)
        neighbours = zip(self._fragment(n, line - 1), self._fragment(n, line + 1), strict=True)
        return [self.ops.splice(above, below) for above, below in neighbours]

    def _fragment(self, n: int, row: int) -> list[Any]:
        if (n, row) not in self.words:
            offset = COLUMNS // 2 * n + row * self.map_pitch
            self.words[n, row] = self.ops.load_matrix(self.map_at, offset, 2, transposed=True)
        return self.words[n, row]


def count(plan: GradientPlan, variant: Variant) -> Tally:
    """What the warps that share the steps of a group do for one plane, all of them together."""
    tally = Tally()
    _add_products(tally, plan, variant, [None] * plan.sums, 0, 0, 0, 0)
    return tally
