"""How work is divided over the thread blocks of a device; no device is needed."""

import itertools

import pytest

pytest.importorskip("numba.cuda", reason="the CUDA extra is not installed")

from sw_transplant.cuda.toeplitz.division import Device, choose_turns
from sw_transplant.cuda.toeplitz.gradient.launcher import divide_gradient
from sw_transplant.cuda.toeplitz.gradient.settings import resident_blocks as resident_gradient_blocks
from sw_transplant.cuda.toeplitz.launcher import divide
from sw_transplant.cuda.toeplitz.settings import resident_blocks
from tests.cuda.toeplitz_cases import DEVICES, LAYERS
from tests.sampling import sample

CHANNELS = {56: 124, 28: 249, 14: 499, 7: 998}


def test_what_is_resident_follows_from_the_scarcest() -> None:
    device = Device(132, 227 * 1024, 228 * 1024)
    assert device.resident(128, 128, 10 * 1024) == 4  # registers: 16 warps
    assert device.resident(128, 168, 10 * 1024) == 3  # 12 warps
    assert device.resident(128, 255, 10 * 1024) == 2  # 8 warps
    assert device.resident(128, 32, 75 * 1024) == 3  # shared memory, and 1 KB for each block
    assert device.resident(256, 32, 1024) == 8  # warps
    assert device.resident(32, 32, 1024) == 32  # blocks
    assert device._replace(warps=48, blocks=16).resident(32, 32, 1024) == 16
    assert device.resident(128, 128, 228 * 1024) == 0


@pytest.mark.parametrize("slots", [1, 84, 396, 528])
@pytest.mark.parametrize("groups", [1, 7, 64, 128])
@pytest.mark.parametrize("each", [3, 124, 998])
def test_no_other_number_of_turns_is_done_sooner(groups: int, each: int, slots: int) -> None:
    def time(turns: int) -> float:
        left = [
            (0.3 + turns) if (g + 1) * turns <= groups else 0.3 + groups % turns for g in range(-(-groups // turns))
        ]
        return -(-len(left) * each // slots) * max(left)

    turns = choose_turns(groups, each, slots, 0.3, 64)
    assert time(turns) == min(time(other) for other in range(1, min(groups, 64) + 1))


OFTEN = LAYERS[:13]
IDLE = list(itertools.product(OFTEN, DEVICES, ["tf32", "float16"]))
TURNS = itertools.cycle(itertools.product(DEVICES, ["tf32", "float16"]))
QUICK = [(layer, *next(TURNS)) for layer in OFTEN for _ in range(3)]


@pytest.mark.parametrize(("layer", "capability", "math"), sample(IDLE, QUICK), ids=str)
def test_little_of_a_device_is_idle(layer, capability, math: str) -> None:
    """Turns of all blocks, over those that the device has room for until the last block is done; batch 128."""
    device, channels = DEVICES[capability], CHANNELS[layer.size[0]]
    plan, gradient = layer.plan(math, capability), layer.gradient_plan(math, capability)
    grid = divide(plan, 128, channels, layer.size, device)
    # Small maps: what a block costs beside its turns counts for more than some idle ones.
    least = 0.83 if layer.size[0] >= 28 else 0.65
    turns = -(-128 // plan.planes) * channels * grid.tiles[0] * grid.tiles[1]
    assert busy(turns, grid, device.multiprocessors * resident_blocks(plan, device)) >= least
    grid = divide_gradient(gradient, 128, channels, layer.size, device)
    turns = -(-grid.items // gradient.planes) * channels * gradient.shares
    assert busy(turns, grid, device.multiprocessors * resident_gradient_blocks(gradient, device)) >= least


def busy(turns: int, grid, slots: int) -> float:
    return turns / (-(-grid.blocks // slots) * grid.turns * slots)
