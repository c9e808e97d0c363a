"""How many thread blocks share the work: what is resident on a device, and turns that leave few of them idle."""

import functools
from typing import NamedTuple

import torch

RESERVED_SHARED = 1024  # bytes that each thread block costs beside its own


class Device(NamedTuple):
    """What of a GPU decides how work is divided.

    Attributes:
        multiprocessors: of the device.
        shared_limit: bytes of shared memory that a thread block may have.
        shared_total: bytes of shared memory of a multiprocessor.
        warps: that a multiprocessor takes at a time.
        blocks: thread blocks that it takes at a time.
    """

    multiprocessors: int
    shared_limit: int
    shared_total: int
    warps: int = 64
    blocks: int = 32

    def resident(self, threads: int, registers: int, shared_bytes: int) -> int:
        """Thread blocks that are on a multiprocessor at a time; 0 if a block does not fit.

        Args:
            threads: of a block.
            registers: of a thread.
            shared_bytes: dynamic shared memory of a block.
        """
        warps = threads // 32
        if shared_bytes > self.shared_limit:
            return 0
        by_shared = self.shared_total // (shared_bytes + RESERVED_SHARED)
        by_registers = 4 * (512 // registers) // warps  # each quarter of a multiprocessor has 512 for a lane
        return min(by_shared, by_registers, self.warps // warps, self.blocks)


@functools.cache
def device_of(index: int) -> Device:
    """CUDA device number `index`."""
    properties = torch.cuda.get_device_properties(index)
    return Device(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
        properties.max_threads_per_multi_processor // 32,
        32 if properties.max_threads_per_multi_processor >= 2048 else 16,
    )


@functools.lru_cache(maxsize=4096)
def choose_turns(groups: int, each: int, slots: int, fixed: float, most: int) -> int:
    """How many groups a thread block takes one after the other, so that the device is done soonest.

    Args:
        groups: that can be taken one after the other.
        each: thread blocks that work side by side on every group: channels, tiles.
        slots: thread blocks that the device runs at a time.
        fixed: what a thread block costs beside its turns, in turns.
        most: turns at most.

    Returns:
        Of the divisions that take least time, the one with the fewest blocks.
    """
    best, least = 1, float("inf")
    for turns in range(1, min(groups, most) + 1):
        blocks = -(-groups // turns) * each
        waves = -(-blocks // max(1, slots))
        if waves * (fixed + turns) <= least:
            best, least = turns, waves * (fixed + turns)
    return best
