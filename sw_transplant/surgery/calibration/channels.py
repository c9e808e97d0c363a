"""Channels are fitted each by itself: some of them at a time, on all cores.

What is made for a channel is large (normal equations take megabytes), and its matrices are small. On a CPU, operations
on all channels at once go through memory instead of caches, and threads that share such an operation wait for each
other longer than they compute. So each thread takes some channels, and does everything for them by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

MAPS_TOGETHER = 16
"""Channels at a time whose maps go through Fourier transforms."""

_TOGETHER_ON_GPU = 512
"""Channels at a time where no caches are to be kept to: some GB."""


def each_part(function: Callable[[slice], T], like: Tensor, together: int = 32) -> list[T]:
    """What a function gives for some channels after the other; without gradients, and without autocast.

    Args:
        function: of a slice of the channels.
        like: ``(C, ...)``: as many channels, on this device. On a CPU as many threads as PyTorch uses share them.
        together: how many at a time, on a CPU.
    """
    channels, on_cpu = len(like), like.device.type == "cpu"
    size = together if on_cpu else _TOGETHER_ON_GPU
    parts = [slice(first, min(first + size, channels)) for first in range(0, channels, size)]
    before = torch.get_num_threads()
    threads = min(before, len(parts)) if on_cpu else 1
    if threads == 1:
        with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
            return [function(part) for part in parts]
    try:
        with ThreadPoolExecutor(threads, "channels", _compute_alone) as pool:
            return list(pool.map(function, parts))
    finally:
        torch.set_num_threads(before)


def _compute_alone() -> None:
    """In a thread of the pool, which takes no modes along: no threads of its own, no gradients."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
