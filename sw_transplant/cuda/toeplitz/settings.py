"""Which plan to use: a search over the few that make sense, with a count of what each would do."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

from sw_transplant.cuda.toeplitz.division import Device
from sw_transplant.cuda.toeplitz.plan import Kernel, Plan, Size, unit, widest_vector
from sw_transplant.cuda.toeplitz.product import count

WHOLE_COLUMNS = 9  # a map up to 72 wide is one tile across
MOST_SUMS = 112  # registers of a thread for sums
MOST_WARPS = 4  # of a thread block: few, so that few wait for each other
# With as many in float32, channels_last maps that are cut into tiles spill some, on compute capability 8.0 and 10.0.
MOST_SUMS_OF_HALOS = {"tf32": 112, "tf32x3": 32, "float16": 128, "bfloat16": 128}
RESIDENT_WARPS = 12  # of a multiprocessor: with fewer than that its units stand idle

# What one costs, in cycles of a multiprocessor: a matrix product, a word for each lane from shared memory, and a word
# for each lane staged (address, load, rounding, store), which the four schedulers share.
PRODUCT_CYCLES, LOAD_CYCLES, STAGE_CYCLES = 2.0, 1.0, 6.0
BYTES_A_CYCLE = 24  # between the cache of the device and a multiprocessor
SECTOR = 32  # bytes, the least that is fetched
WAIT_CYCLES = 1500  # from the loads of a turn to their arrival
TURNS = 8  # taps are staged once in about so many turns
# Planes of a thread block, and rounds in which its warps take them.
IMAGES = ((1, 1), (2, 1), (4, 1))
CHANNELS = tuple((planes, rounds) for planes in (16, 8, 4) for rounds in (1, 2, 4))
MOST_WARPS_OF_CHANNELS = 16
START_CYCLES = 2000  # of a thread block, until its first loads have arrived


@functools.lru_cache(maxsize=1024)
def choose_plan(
    math: str,
    size: Size,
    sizes: tuple[Size, ...],
    origins: tuple[Size, ...],
    device: Device,
    vector: int = 0,
    channels_last: bool = False,
) -> Plan | None:
    """The plan of least cost for a map, or None if none fits, as for an empty map.

    Args:
        math: as in `Plan`.
        size: (H, W) of the map.
        sizes, origins: taps and zeros before the map of each kernel.
        device: that it is for.
        vector: values that can be loaded at once; 0 for the most that fit into the rows of a contiguous map.
        channels_last: the memory format of the map.
    """
    if 0 in size:
        return None
    vector = vector or widest_vector(math, size[1])
    best: tuple[float, Plan] | None = None
    for shape in _candidates(math, size, sizes, origins):
        plan = dataclasses.replace(shape, vector=vector, channels_last=channels_last)
        if channels_last and None in plan.whole and 4 * plan.blocks * plan.columns >= MOST_SUMS_OF_HALOS[math]:
            continue
        cycles = _cycles(plan, size)
        for planes, rounds in CHANNELS if channels_last else IMAGES:
            several = dataclasses.replace(plan, planes=planes, rounds=rounds)
            most = MOST_WARPS_OF_CHANNELS if channels_last else max(MOST_WARPS, plan.parts)
            if several.threads > 32 * most or (channels_last and planes % vector):
                continue
            resident = resident_blocks(several, device)
            if resident:
                cost = _cost(several, size, cycles, resident)
                if best is None or cost < best[0]:
                    best = cost, several
    return best[1] if best else None


def _cost(plan: Plan, size: Size, cycles: float, resident: int) -> float:
    """Cycles of one image and channel, `resident` thread blocks being on a multiprocessor at a time."""
    tiles = -(-size[0] // plan.step_out[0]) * -(-size[1] // plan.step_out[1])
    taps = STAGE_CYCLES / 4 * plan.channels * plan.tap_words / plan.planes / 32 / TURNS
    computed = (cycles + taps) * max(1.0, RESIDENT_WARPS / (resident * plan.threads / 32))
    itemsize = 2 if plan.packed else 4
    fetched = itemsize if not plan.channels_last else max(itemsize, SECTOR / plan.planes)  # bytes of a value
    area = plan.area
    moved = tiles * fetched * (area.rows * area.columns + plan.step_out[0] * plan.step_out[1]) / BYTES_A_CYCLE
    # A block waits for its loads and stores, while the others on the multiprocessor compute.
    own = cycles + moved + tiles * WAIT_CYCLES / plan.planes
    return max(computed, moved, own / resident)


def resident_blocks(plan: Plan, device: Device) -> int:
    """Thread blocks of a plan that are on a multiprocessor at a time."""
    return device.resident(plan.threads, plan.registers, 4 * plan.shared_words)


@functools.lru_cache(maxsize=1024)
def fixed_turns(plan: Plan) -> float:
    """What a thread block costs beside its turns, in turns."""
    taps = STAGE_CYCLES / 4 * plan.channels * plan.tap_words / 32
    return (START_CYCLES + taps) / (plan.planes * _tile_cycles(plan))


def _candidates(math: str, size: Size, sizes: Sequence[Size], origins: Sequence[Size]) -> Iterator[Plan]:
    """Plans of one plane each, before it is known whether they fit."""
    for kernels, (blocks, columns) in itertools.product(
        oriented(sizes, origins), itertools.product((1, 2, 4), _tile_columns(size[1]))
    ):
        if 4 * blocks * columns > MOST_SUMS:
            continue
        rows = -(-size[0] // 16)
        parts = -(-rows // blocks)
        whole_rows = parts <= MOST_WARPS
        whole = (size[0] if whole_rows else None, size[1] if 8 * columns >= size[1] else None)
        for starts in itertools.product(*(_starts(math, kernels, axis, whole[axis]) for axis in (0, 1))):
            warps = parts if whole_rows else MOST_WARPS
            plan = Plan(math, kernels, whole, blocks, warps, columns, 1, 255, (starts[0], starts[1]))
            registers = _registers(plan)
            if registers is not None:
                yield dataclasses.replace(plan, registers=registers)


def oriented(sizes: Sequence[Size], origins: Sequence[Size]) -> Iterator[tuple[Kernel, ...]]:
    """Long kernels are contracted along their long side; the square ones all alike, in both ways."""
    axes = {(0 if kh > kw else 1, 0 if kh >= kw else 1) for kh, kw in sizes if kh == kw} or {(1, 1)}
    for square in (1, 0) if len(axes) and any(kh == kw for kh, kw in sizes) else (1,):
        yield tuple(
            Kernel(size, origin, square if size[0] == size[1] else int(size[1] > size[0]))
            for size, origin in zip(sizes, origins, strict=True)
        )


def _tile_columns(width: int) -> list[int]:
    """Groups of 8 columns of a tile: all of a narrow map, equal shares of a wide one."""
    groups = -(-width // 8)
    whole = {groups} if groups <= WHOLE_COLUMNS else set()
    if groups < WHOLE_COLUMNS:
        return [groups]
    return sorted(whole | {-(-groups // across) for across in (-(-groups // 8), -(-groups // 7), -(-groups // 4))})


def _starts(math: str, kernels: Sequence[Kernel], axis: int, whole: int | None) -> list[int]:
    """Where steps may begin: at the map's edge (no step for the zeros outside) or at the first tap (fewer steps where
    the kernel is short); along the columns of a map at a multiple of what is staged at once."""
    before = [kernel.origin[axis] for kernel in kernels if kernel.axis == axis]
    if not before:
        return [0]
    first = -max(before)
    first -= first % unit(math) if axis == 1 else 0
    return [first] if whole is None else sorted({0, min(0, first)}, reverse=True)


def _registers(plan: Plan) -> int | None:
    """Registers of a thread that the assembler gets along with (`tests/cuda/test_toeplitz_ptx.py`); None if too many.

    Beside the sums it wants the fragments of a line of taps and the loads that are under way: more of them where a line
    has many steps, and twice as many for split operands, whose products wait in registers of their own to be added.
    """
    sums = 4 * plan.blocks * plan.columns
    limits: tuple[tuple[int, int], ...]
    if plan.math == "tf32x3":
        long = any(plan.contracted(axis) and plan.steps(axis) > 8 for axis in (0, 1))
        limits = ((16, 168 if long else 128), (24 if long and plan.blocks > 1 else 32, 255))
    else:
        long = bool(plan.contracted(1)) and plan.steps(1) > 10
        limits = ((48 if long else 56, 128), (72, 168), (112, 255))
    return next((registers for limit, registers in limits if sums <= limit), None)


def _cycles(plan: Plan, size: Size) -> float:
    """Cycles of one image and channel, on a multiprocessor that never waits."""
    down, across = (-(-s // t) for s, t in zip(size, plan.step_out, strict=True))
    return down * across * _tile_cycles(plan)


def _tile_cycles(plan: Plan) -> float:
    """The same for one tile of it."""
    tally = count(plan)
    copies = set(plan.copies.values())
    staged = sum(copy.lead + copy.rows * copy.pitch for copy in copies) + plan.tile[0] * plan.tile[1]
    products = tally.products * (3 if plan.math == "tf32x3" else 1)
    return PRODUCT_CYCLES * products + LOAD_CYCLES * tally.loads + STAGE_CYCLES / 4 * staged / 32
