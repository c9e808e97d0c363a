"""Channels are fitted each by itself: some of them at a time, on all cores.

What is made for each channel is large (its normal equations take a megabyte), and matrices are small: operations on all
channels at once would go through memory, and wait for each other's threads more than they compute. So each thread takes
some channels and does everything for them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def each_part(function: Callable[[slice], T], like: Tensor, together: int = 32) -> list[T]:
    """What a function gives for some channels after the other; without gradients, and without autocast.

    Args:
        function: of a slice of the channels.
        like: ``(C, ...)``: as many channels. On a CPU as many threads as PyTorch uses share them.
        together: how many at a time.
    """
    channels = len(like)
    parts = [slice(first, min(first + together, channels)) for first in range(0, channels, together)]
    threads = min(torch.get_num_threads(), len(parts))
    if threads == 1 or like.device.type != "cpu":
        with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
            return [function(part) for part in parts]
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "channels", _compute_alone) as pool:
            return list(pool.map(function, parts))
    finally:
        torch.set_num_threads(before)


def _compute_alone() -> None:
    """In a thread of the pool, which takes no modes along: no threads of its own, no gradients."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
