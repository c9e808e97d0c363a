"""Images where there are none."""

from __future__ import annotations

from torch import Tensor, nn


def synthesise(model: nn.Module, input_size: int | tuple[int, ...] | None, count: int, *, progress: bool) -> Tensor:
    """Placeholder."""
    raise NotImplementedError
