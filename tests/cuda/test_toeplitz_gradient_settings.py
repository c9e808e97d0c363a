"""The plans of the weight gradient: lines, products, shared memory, the grid, and the addresses of every load."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("numba.cuda", reason="the CUDA extra is not installed")

from sw_transplant.cuda.toeplitz.gradient.launcher import MOST_TURNS, divide_gradient, gradients_from
from sw_transplant.cuda.toeplitz.gradient.plan import GradientPlan
from sw_transplant.cuda.toeplitz.gradient.product import count, multiply, spread
from sw_transplant.cuda.toeplitz.gradient.settings import MOST_SUMS, MOST_WARPS, choose_gradient_plan
from sw_transplant.cuda.toeplitz.plan import unit
from sw_transplant.cuda.toeplitz.tally import Tally
from tests.cuda.toeplitz_cases import DEVICES, LAYERS, MATHS, Layer, strips
from tests.sampling import sample

SIZES = [(1, 1), (7, 7), (13, 29), (28, 28), (56, 56), (33, 72), (65, 97), (130, 40), (40, 130), (512, 2048)]
KERNELS = [strips(51, 5, (5, 5)), strips(13, 3), ((31, 31),), ((7, 7),), ((1, 1),), ((8, 4), (4, 6))]
TARGETS = [("tf32", (9, 0)), ("tf32x3", (8, 6)), ("float16", (9, 0)), ("bfloat16", (8, 0))]
PLANS = [
    (math, size, sizes, capability) for (math, capability), size, sizes in itertools.product(TARGETS, SIZES, KERNELS)
]
# Every map with every set of kernels, and each of them with every target.
QUICK = [
    case
    for case in PLANS
    if TARGETS.index((case[0], case[3])) == (SIZES.index(case[1]) + KERNELS.index(case[2])) % len(TARGETS)
]


class Trace(Tally):
    """Notes the words of shared memory that the lanes of a warp touch, and looks for conflicts of banks."""

    def __init__(self, plan: GradientPlan, plane: int, group: int, part: int) -> None:
        super().__init__()
        self.touched: list[np.ndarray] = []
        multiply(self, plan, [None] * plan.sums, plane, np.arange(32), group, part)

    def load(self, at, offset):
        words = np.broadcast_to(at + offset, 32)
        assert len(set(words % 32)) == 32, "two lanes read different words of a bank"
        self.touched.append(words)

    def load_matrix(self, at, offset, count=4, transposed=False):
        rows = np.broadcast_to(at + offset, 32)[: 8 * count]
        assert (rows % 4 == 0).all()
        for matrix in rows.reshape(count, 8):
            assert len(set(matrix // 4 % 8)) == 8, "two rows of a matrix lie in the same banks"
        self.touched += [rows, rows + 3]
        return [None] * count

    def repeat(self, times, body, state, first=0, by=1):
        for number in {first, first + (times - 1 - first) // by * by}:
            body(number, state)
        return state

    def choose(self, which, variants, table=None):
        return variants[table[which]]()


@pytest.mark.parametrize(("math", "size", "sizes", "capability"), sample(PLANS, QUICK), ids=str)
def test_limits_and_addresses(math, size, sizes, capability) -> None:
    origins = tuple(((kh - 1) // 2, kw // 2) for kh, kw in sizes)
    plan = choose_gradient_plan(math, size, sizes, origins, DEVICES[capability])
    assert plan is not None
    assert 4 * plan.shared_words <= DEVICES[capability].shared_limit
    assert plan.warps <= MOST_WARPS
    assert plan.most_resident >= 1
    assert plan.sums <= MOST_SUMS
    for whole, extent, tile in zip(plan.whole, size, plan.tile, strict=True):
        assert tile == extent if whole is not None else tile % 16 == 0
        assert whole in (None, extent)
    for copy, area in ((plan.grad_copy, plan.grad_area), (plan.map_copy, plan.map_area)):
        assert copy.first % 4 == 0
        assert copy.row <= area.row <= area.row + area.rows <= copy.row + copy.rows
        assert area.column % unit(math) == 0
        assert copy.column - unit(math) < area.column
        assert copy.column % (4 if plan.packed else unit(math)) == 0
        assert area.column + area.columns <= copy.column + copy.pitch * copy.step[1]
    assert plan.map_copy.first >= plan.grad_copy.end
    for group, part in itertools.product(range(plan.shares * plan.together), range(plan.parts)):
        for plane in {0, plan.planes - 1}:
            begin = plane * plan.plane_words
            touched = np.concatenate([np.array([begin]), *Trace(plan, begin, group, part).touched])
            assert touched.min() >= begin
            assert touched.max() < begin + plan.plane_words


@pytest.mark.parametrize(
    ("layer", "math"),
    sample(itertools.product(LAYERS, MATHS), list(zip(LAYERS, itertools.cycle(MATHS), strict=False))),
    ids=str,
)
def test_every_line_belongs_to_one_warp(layer: Layer, math: str) -> None:
    plan = layer.gradient_plan(math)
    lines = [(group.kernel, group.first + i) for group in plan.groups for i in range(group.lines)]
    assert sorted(lines) == [(k, i) for k, kernel in enumerate(plan.kernels) for i in range(kernel.lines)]
    for index, group in enumerate(plan.groups):
        assert index == plan.first_group(group.kernel) + group.first // plan.lines[group.kernel]
        variant = plan.variants[plan.variant_of_group[index]]
        assert (variant.kernel, variant.lines) == (group.kernel, group.lines)
    assert (plan.shares - 1) * plan.together < len(plan.groups) <= plan.shares * plan.together


@pytest.mark.parametrize("math", ["tf32", "float16"])
@pytest.mark.parametrize("layer", [*LAYERS[:15], Layer((9, 9), ((3, 5), (5, 3), (5, 3)))], ids=str)
def test_no_product_is_missing_and_none_is_in_vain(layer: Layer, math: str) -> None:
    plan = layer.gradient_plan(math)
    for number, kernel in enumerate(plan.kernels):
        axis, start = kernel.axis, kernel.origin[kernel.axis]
        extent, whole = plan.tile[axis], plan.whole[axis]
        needed = set()
        for p, tap in itertools.product(range(extent), range(kernel.length)):
            r = p + tap - start
            if whole is None or 0 <= r < whole:
                needed.add(((r + plan.lead(number)) // 8, p // 16))
        assert {(n, m) for n, met in plan.bands[number] for m in met} == needed


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("layer", LAYERS[:12], ids=str)
def test_products_are_enough_and_few(layer: Layer, math: str) -> None:
    plan = layer.gradient_plan(math)
    for variant in plan.variants:
        kernel, tally = plan.kernels[variant.kernel], count(plan, variant)
        assert tally.products == variant.lines * plan.steps(kernel.axis) * sum(
            len(m) for _, m in plan.bands[variant.kernel]
        )
        assert tally.loads <= 4 * tally.products
    if layer is LAYERS[0] and math == "tf32":
        loads, products = (
            sum(getattr(count(plan, plan.variants[v]), what) for v in plan.variant_of_group)
            for what in ("loads", "products")
        )
        assert loads < products


BATCHES = [1, 3, 128, 1024]


@pytest.mark.parametrize(
    ("layer", "batch"),
    sample(itertools.product(LAYERS, BATCHES), list(zip(LAYERS, itertools.cycle(BATCHES), strict=False))),
    ids=str,
)
def test_every_tile_belongs_to_one_block(layer: Layer, batch: int) -> None:
    channels = 96
    for plan in {layer.gradient_plan("float16"), replace(layer.gradient_plan("tf32"), planes=3)}:
        grid = divide_gradient(plan, batch, channels, layer.size, DEVICES[9, 0])
        for extent, tiles, tile in zip(layer.size, grid.tiles, plan.tile, strict=True):
            assert (tiles - 1) * tile < extent <= tiles * tile
        assert grid.items == batch * grid.tiles[0] * grid.tiles[1]
        assert grid.blocks == grid.chunks * channels * plan.shares
        assert 1 <= grid.turns <= MOST_TURNS
        assert (grid.chunks - 1) * grid.turns * plan.planes < grid.items <= grid.chunks * grid.turns * plan.planes


def test_spread_writes_every_fragment_of_a_line() -> None:
    plan = Layer((21, 19), strips(9, 5, (3, 3))).gradient_plan("tf32", lines=(3, 2, 1), registers=255)

    class Stores(Tally):
        def __init__(self) -> None:
            super().__init__()
            self.written: list[int] = []

        def choose(self, which, variants, table=None):
            return variants[which]()

        def store_pair(self, at, offset, first, second):
            assert ((at + offset) % 2 == 0).all()
            for half in range(0, 32, 16):  # 64 bits of 16 lanes at a time
                assert len(set((at + offset)[half : half + 16] // 2 % 16)) == 16
            self.written += [*(at + offset), *(at + offset + 1)]

    for number, slot in itertools.product(range(3), range(3)):
        ops = Stores()
        spread(ops, plan, list(range(plan.sums)), 0, np.arange(32), number * 3 + slot)
        width = 8 * len(plan.distances[number]) if slot < plan.lines[number] else 0
        expected = [row * plan.scratch_pitch + column for row in range(16) for column in range(width)]
        assert sorted(ops.written) == expected


def test_chunks_are_added_up_for_each_kernel() -> None:
    plan = Layer((21, 19), ((3, 2), (1, 4))).gradient_plan("float16")
    workspace = torch.arange(3 * 2 * 10, dtype=torch.float32).view(3, 20)
    first, second = gradients_from(workspace, plan, 2, torch.float16)
    assert torch.equal(first.flatten(), workspace[:, :12].sum(0).half())
    assert torch.equal(second.flatten(), workspace[:, 12:].sum(0).half())
    assert (first.shape, second.shape) == ((2, 1, 3, 2), (2, 1, 1, 4))
    assert first.is_contiguous()
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("size", "sizes", "origins"),
    [
        ((9, 9), ((3, 3),), ((20, 0),)),  # no tap of it is on the map
        ((9, 9), ((5, 3),), ((0, -30),)),
        ((4000, 4000), ((2001, 2001),), ((1000, 1000),)),  # a tile with such a halo does not fit
    ],
)
def test_no_plan(size, sizes, origins) -> None:
    for math in MATHS:
        assert choose_gradient_plan(math, size, sizes, origins, DEVICES[9, 0]) is None


def test_the_search_is_a_function_of_its_arguments() -> None:
    arguments = ("tf32", (56, 56), strips(51, 5), ((25, 2), (2, 25)), DEVICES[9, 0])
    assert choose_gradient_plan.__wrapped__(*arguments) == choose_gradient_plan.__wrapped__(*arguments)
