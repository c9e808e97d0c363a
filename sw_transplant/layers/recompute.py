"""Less memory in training: what a BatchNorm normalises is computed again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Recompute = Literal["none", "small", "all"]
"""Which branches are computed twice: none; those that are cheap beside the largest; all."""
CHEAP = 4
"""A branch is cheap if the largest one has at least so many times its taps."""


def computed_twice(which: Recompute, taps: Sequence[int]) -> list[bool]:
    """Which of several branches with so many taps are computed twice."""
    largest = max(taps, default=0)
    return [which == "all" or (which == "small" and CHEAP * count <= largest) for count in taps]


def normalise(norm: nn.Module, responses: Tensor, again: Callable[[], Tensor]) -> Tensor:
    """``norm(responses)``, without keeping the responses for the backward pass.

    Args:
        norm: a BatchNorm; whatever else it saves is kept.
        responses: its input, of which nobody else needs to keep hold.
        again: gives equal responses; called in the backward pass, without gradients.
    """

    def pack(saved: Tensor) -> Any:
        return None if saved is responses or saved.data_ptr() == responses.data_ptr() else saved

    def unpack(kept: Any) -> Tensor:
        if kept is not None:
            return kept  # type: ignore[no-any-return]
        with torch.no_grad():
            return again()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return norm(responses)  # type: ignore[no-any-return]
