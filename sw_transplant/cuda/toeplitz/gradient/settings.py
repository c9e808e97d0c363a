"""Which plan a weight gradient uses: a search over the few that make sense, with a count of what each would do."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from sw_transplant.cuda.toeplitz.division import Device
from sw_transplant.cuda.toeplitz.gradient.plan import GradientPlan
from sw_transplant.cuda.toeplitz.gradient.product import count
from sw_transplant.cuda.toeplitz.plan import IN_FLIGHT, Size, padded, widest_vector
from sw_transplant.cuda.toeplitz.settings import (
    BYTES_A_CYCLE,
    LOAD_CYCLES,
    MOST_WARPS_OF_CHANNELS,
    PRODUCT_CYCLES,
    RESIDENT_WARPS,
    SECTOR,
    STAGE_CYCLES,
    START_CYCLES,
    oriented,
)

WHOLE = 96  # rows or columns that one tile covers
CUT = 48  # with more than that, tiles may be smaller than the map
TILES = (32, 64, 96)  # about the rows or columns of the tiles of a map that is cut
MOST_SUMS = 144  # registers of a thread for sums
MOST_WARPS = 12  # of a thread block
WAIT_CYCLES = 700  # from a load of global memory to its arrival
TURNS = 16  # the fragments of a line are given away once in about so many turns


class Work(NamedTuple):
    """Cycles of a multiprocessor that never waits, for one plane."""

    groups: tuple[float, ...]  # the products of each group of lines
    staging: float
    giving: float  # fragments of sums through shared memory, per warp that shares a line, once in a block's life


@functools.lru_cache(maxsize=1024)
def choose_gradient_plan(
    math: str,
    size: Size,
    sizes: tuple[Size, ...],
    origins: tuple[Size, ...],
    device: Device,
    vector: int = 0,
    channels_last: bool = False,
) -> GradientPlan | None:
    """The plan of least cost for a map, or None if none fits; arguments as of `toeplitz.settings.choose_plan`."""
    if 0 in size:
        return None
    vector = vector or widest_vector(math, size[1])
    best: tuple[float, GradientPlan] | None = None
    for contiguous in _shapes(math, size, sizes, origins):
        shape = dataclasses.replace(contiguous, vector=vector, channels_last=channels_last)
        tiles = -(-size[0] // shape.tile[0]) * -(-size[1] // shape.tile[1])
        work = _work(shape)
        for plan in _divisions(shape):
            resident = resident_blocks(plan, device)
            if resident:
                cost = tiles * _cycles(plan, work, resident)
                if best is None or cost < best[0]:
                    best = cost, plan
    return best[1] if best else None


def resident_blocks(plan: GradientPlan, device: Device) -> int:
    """Thread blocks of a plan that are on a multiprocessor at a time."""
    return device.resident(plan.threads, plan.registers, 4 * plan.shared_words)


@functools.lru_cache(maxsize=1024)
def fixed_turns(plan: GradientPlan) -> float:
    """What a thread block costs beside its turns, in turns: it begins with zeros, and gives its sums away."""
    work = _work(plan)
    turn = plan.planes * (sum(work.groups) / plan.shares + work.staging)
    zeros = STAGE_CYCLES / 4 / 4 * plan.shared_words / 32
    return (START_CYCLES + zeros + work.giving * plan.parts * plan.planes / plan.shares) / turn


def _shapes(math: str, size: Size, sizes: tuple[Size, ...], origins: tuple[Size, ...]) -> Iterator[GradientPlan]:
    """Tiles and lines; every group of lines on its own."""
    for kernels, tile in itertools.product(
        oriented(sizes, origins), itertools.product(_extents(size[0]), _extents(size[1]))
    ):
        whole = tuple(s if s == t else None for s, t in zip(size, tile, strict=True))
        plan = GradientPlan(math, kernels, (whole[0], whole[1]), tile, (1,) * len(sizes), 1, 1, 1, 255)
        if not plan.applies:
            continue
        needed = [4 * len(distances) for distances in plan.distances]
        found = set()
        for most in range(max(needed), MOST_SUMS + 1, 4):
            lines = tuple(_even(k.lines, max(1, most // n)) for k, n in zip(kernels, needed, strict=True))
            divided = dataclasses.replace(plan, lines=lines)
            registers = _registers(divided)
            if registers is not None and lines not in found:
                found.add(lines)
                yield dataclasses.replace(divided, registers=registers)


def _registers(plan: GradientPlan) -> int | None:
    """Registers of a thread that the assembler gets along with (`tests/cuda/test_toeplitz_gradient_ptx.py`); None if
    too many.

    Beside the sums it wants the fragments of the gradient that a fragment of the map meets, and loads that are under
    way; split operands, and sums of one plane at a time, double that. A quarter of a multiprocessor has 512 registers
    for a lane: these are the limits at which it takes one warp less.
    """
    needed, limits = plan.sums, ((40, 96), (72, 128), (104, 168), (MOST_SUMS, 255))
    if plan.math == "tf32x3":
        limits = ((16, 96), (24, 128), (36, 168), (72, 255))
    elif plan.packed:
        needed += 4 * max(0, max(len(met) for band in plan.bands for _, met in band) - 4)
    return next((registers for limit, registers in limits if needed <= limit), None)


def _divisions(shape: GradientPlan) -> Iterator[GradientPlan]:
    """Warps of a thread block: groups of lines, planes, and parts of their steps."""
    groups = len(shape.groups)
    steps = min(shape.steps(kernel.axis) for kernel in shape.kernels)
    channels_last, most = shape.channels_last, MOST_WARPS_OF_CHANNELS if shape.channels_last else MOST_WARPS
    numbers = (2, 4, 8, 16) if channels_last else (1, 2, 4, 8)
    for shares, planes, parts in itertools.product(range(1, groups + 1), numbers, (1, 2, 4)):
        together = -(-groups // shares)
        plan = dataclasses.replace(shape, together=together, planes=planes, parts=parts)
        if planes % shape.vector and channels_last:
            continue
        if plan.shares == shares and plan.warps <= most and parts <= steps and plan.most_resident:
            yield plan


def _extents(size: int) -> list[int]:
    """Rows or columns of tiles: all of a small map, about equal shares of a large one."""
    shares = {-(-size // tile) for tile in TILES} if size > CUT else set()
    cut = {padded(-(-size // n), 16) for n in shares if n > 1}
    return sorted(cut | ({size} if size <= WHOLE else set()))


def _even(lines: int, most: int) -> int:
    """Lines of a warp, with no more than `most`, so that all warps have about as many."""
    return -(-lines // -(-lines // most))


def _work(shape: GradientPlan) -> Work:
    times = 3 if shape.math == "tf32x3" else 1
    tallies = [count(shape, variant) for variant in shape.variants]
    groups = [PRODUCT_CYCLES * times * tally.products + LOAD_CYCLES * tally.loads for tally in tallies]
    staged = sum(area.rows * area.columns for area in (shape.map_area, shape.grad_area)) / (2 if shape.packed else 1)
    giving = sum(k.lines * (4 * len(d) + k.length / 2) for k, d in zip(shape.kernels, shape.distances, strict=True))
    return Work(tuple(groups[v] for v in shape.variant_of_group), STAGE_CYCLES / 4 * staged / 32, giving)


def _cycles(plan: GradientPlan, work: Work, resident: int) -> float:
    """Cycles of a multiprocessor for one plane, `resident` thread blocks being on it at a time."""
    steps = min(plan.steps(kernel.axis) for kernel in plan.kernels)
    slowest = max(work.groups) * -(-steps // plan.parts) / (steps / plan.parts)
    busy = sum(work.groups) / (slowest * plan.together * plan.shares)  # of the warps, while products are computed
    products = sum(work.groups) * max(1.0, RESIDENT_WARPS / (resident * plan.warps * busy))
    cycles = products + work.staging * plan.shares + work.giving * plan.parts / TURNS
    threads, itemsize = 32 * plan.plane_warps, 2 if plan.packed else 4
    areas = [area.rows * area.columns for area in (plan.map_area, plan.grad_area)]
    waits = sum(-(-area * itemsize // (threads * 4 * IN_FLIGHT)) for area in areas)
    fetched = itemsize if not plan.channels_last else max(itemsize, SECTOR / plan.planes)  # bytes of a value
    moved = plan.shares * fetched * sum(areas) / BYTES_A_CYCLE
    # A block waits for its loads, while the others on the multiprocessor compute.
    own = (cycles + moved) * plan.planes / plan.shares
    return max(cycles, moved, (own + WAIT_CYCLES * waits) / resident / plan.planes * plan.shares)
