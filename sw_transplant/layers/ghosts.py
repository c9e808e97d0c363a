"""Putting the channels that a module computed among those that bypass it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sw_transplant.ops.tracing import is_transformed


def place_channels(passed: Tensor, channels: Tensor, y: Tensor) -> Tensor:
    """``passed.index_copy(1, channels, y)``, keeping nothing for the backward pass but the channels.

    Args:
        passed: ``(B, C, H, W)``.
        channels: int64 ``(active,)``.
        y: ``(B, active, H, W)``, dtype of ``passed``.

    Returns:
        ``(B, C, H, W)``.
    """
    if is_transformed():
        return passed.index_copy(1, channels, y)
    placed: Tensor = _PlaceChannels.apply(passed, channels, y)
    return placed


class _PlaceChannels(torch.autograd.Function):
    """``passed.index_copy(1, channels, y)``, whose own backward pass would keep y to know its shape."""

    @staticmethod
    def forward(ctx: Any, passed: Tensor, channels: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(channels)
        return passed.index_copy(1, channels, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        (channels,) = ctx.saved_tensors
        return grad.index_fill(1, channels, 0), None, grad.index_select(1, channels)
