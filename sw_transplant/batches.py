"""What is taken for a batch of images, and how errors call what came instead."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor


def is_images(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a floating-point tensor ``(N, C, H, W)``."""
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()


def describe(value: Any) -> str:
    """A value for an error message: dtype and shape of a tensor, else the class."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
