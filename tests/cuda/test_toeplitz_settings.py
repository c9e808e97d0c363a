"""The plans of the Toeplitz kernels: tiles, shared memory, the grid, and the addresses of every load."""

import itertools

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the CUDA extra is not installed")

from sw_transplant.cuda.toeplitz.gradient.settings import choose_gradient_plan
from sw_transplant.cuda.toeplitz.launcher import MOST_TURNS, divide
from sw_transplant.cuda.toeplitz.plan import Plan, unit
from sw_transplant.cuda.toeplitz.product import count, multiply, spread
from sw_transplant.cuda.toeplitz.settings import choose_plan
from sw_transplant.cuda.toeplitz.tally import Tally
from tests.cuda.toeplitz_cases import DEVICES, LAYERS, MATHS, strips
from tests.sampling import sample

SIZES = [(1, 1), (7, 7), (13, 29), (28, 28), (56, 56), (33, 72), (65, 73), (130, 40), (40, 130), (512, 2048)]
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


def plan_of(math, size, sizes, capability) -> Plan:
    origins = tuple(((kh - 1) // 2, kw // 2) for kh, kw in sizes)
    plan = choose_plan(math, size, sizes, origins, DEVICES[capability])
    assert plan is not None
    return plan


class Trace(Tally):
    """Notes the words of shared memory that the lanes of a warp touch."""

    def __init__(self, plan: Plan, plane: int, part: int) -> None:
        super().__init__()
        self.touched: list[np.ndarray] = []
        lane = np.arange(32)
        taps = plan.planes * plan.plane_words
        sums = multiply(self, plan, plane, taps, lane, part)
        spread(self, plan, sums, plane, lane, part)

    def load(self, at, offset):
        self.touched.append(np.broadcast_to(at + offset, 32))

    def load_matrix(self, at, offset, count=4, transposed=False):
        address = np.broadcast_to(at + offset, 32)
        assert (address % 4 == 0).all()
        self.touched += [address, address + 3]
        return [None] * count

    def store_pair(self, at, offset, first, second):
        assert ((at + offset) % 2 == 0).all()
        self.touched += [at + offset, at + offset + 1]

    def repeat(self, times, body, state, first=0, by=1):
        for number in {0, times - 1}:
            body(number, state)
        return state

    def choose(self, which, variants, table=None):
        return variants[which if table is None else table[which]]()


@pytest.mark.parametrize(("math", "size", "sizes", "capability"), sample(PLANS, QUICK), ids=str)
def test_limits_and_addresses(math, size, sizes, capability) -> None:
    check_limits_and_addresses(plan_of(math, size, sizes, capability), math, size, capability)


@pytest.mark.parametrize("channels", [124, 249])
@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("layer", LAYERS[:13], ids=str)
def test_limits_and_addresses_of_channels_last_maps(layer, math: str, channels: int) -> None:
    plan = layer.plan(math, channels=channels)
    assert plan.channels == plan.planes == plan.seats * plan.rounds
    assert plan.planes % plan.vector == 0 == channels % plan.vector
    assert plan.plane_words % 8 == 4  # channels of a pixel are written to different banks
    check_limits_and_addresses(plan, math, layer.size, (9, 0))


def check_limits_and_addresses(plan: Plan, math: str, size, capability) -> None:
    assert 4 * plan.shared_words <= DEVICES[capability].shared_limit
    assert plan.threads <= 1024
    assert plan.threads * plan.registers <= 65536
    for whole, extent, tile in zip(plan.whole, size, plan.tile, strict=True):
        assert whole is None or (whole == extent and tile >= extent)
    for copy in plan.copies.values():
        # Without conflicts of banks: 8 rows of 4 words, or 4 rows of 8.
        assert copy.pitch % 16 == 8 if copy.step == (2, 1) else copy.pitch % 8 == 4
        assert copy.first % 4 == 0
        assert copy.lead <= copy.first
        # Runs of 16 bytes: of the map, and where they are written.
        assert copy.column % unit(math) == 0
        assert (copy.row - plan.area.row) % copy.step[0] == 0
    for plane, part in itertools.product({0, plan.planes - 1}, range(plan.parts)):
        touched = np.concatenate(Trace(plan, plane * plan.plane_words, part).touched)
        assert touched.min() >= 0
        assert touched.max() < plan.shared_words


@pytest.mark.parametrize("batch", [1, 3, 128, 1024])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_output_belongs_to_one_block(layer, batch: int) -> None:
    channels = 3
    plan = layer.plan("float16")
    grid = divide(plan, batch, channels, layer.size, DEVICES[9, 0])
    assert 1 <= grid.turns <= MOST_TURNS
    for extent, tiles, step in zip(layer.size, grid.tiles, plan.step_out, strict=True):
        covered = np.zeros(tiles * step, int)
        for tile in range(tiles):
            covered[tile * step : (tile + 1) * step] += 1
        assert (covered == 1).all()
        assert (tiles - 1) * step < extent <= tiles * step  # no tile is without outputs
    images = np.zeros(batch, int)
    groups = grid.blocks // (channels * grid.tiles[0] * grid.tiles[1])
    for group, turn, mine in itertools.product(range(groups), range(grid.turns), range(plan.planes)):
        image = (group * grid.turns + turn) * plan.planes + mine
        if image < batch:
            images[image] += 1
    assert (images == 1).all()


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_products_outside_the_band_are_left_out(layer, math: str) -> None:
    plan = layer.plan(math)
    all_of_them = 0
    for kernel in plan.kernels:
        all_of_them += kernel.lines * plan.steps(kernel.axis) * plan.parts * plan.blocks * plan.columns
    tally = count(plan)
    # What is needed at least: a product has 16 x 8 x depth terms, and the taps of a line see that much of the map.
    needed = 0.0
    for kernel in plan.kernels:
        rows, columns = layer.size[kernel.axis], layer.size[1 - kernel.axis]
        positions = np.arange(rows)
        first = np.maximum(positions - kernel.origin[kernel.axis], 0 if plan.whole[kernel.axis] else -(10**6))
        last = positions - kernel.origin[kernel.axis] + kernel.length
        if plan.whole[kernel.axis]:
            last = np.minimum(last, rows)
        needed += kernel.lines * columns * (last - first).sum()
    tiles = np.prod([-(-s // t) for s, t in zip(layer.size, plan.step_out, strict=True)])
    assert needed <= tiles * tally.products * 16 * 8 * plan.depth
    assert tally.products <= all_of_them


def test_no_plan_for_taps_that_do_not_fit() -> None:
    assert choose_plan("tf32", (300, 300), ((301, 301),), ((150, 150),), DEVICES[9, 0]) is None


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("choose", [choose_plan, choose_gradient_plan])
def test_no_plan_for_an_empty_map(choose, size) -> None:
    assert choose("tf32", size, strips(13, 5), ((6, 2), (2, 6)), DEVICES[9, 0]) is None


def test_the_search_is_a_function_of_its_arguments() -> None:
    arguments = ("tf32", (56, 56), strips(51, 5), ((25, 2), (2, 25)), DEVICES[9, 0])
    assert choose_plan.__wrapped__(*arguments) == choose_plan.__wrapped__(*arguments)
