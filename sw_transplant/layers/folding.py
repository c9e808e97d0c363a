"""What a BatchNorm in eval mode multiplies with and adds, and the sum of what branches add."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn


def keeps_statistics(bn: nn.Module) -> bool:
    """Whether a BatchNorm has running statistics, without which nothing folds."""
    return getattr(bn, "running_mean", None) is not None


def batch_norm_affine(bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Eval-mode BatchNorm as y = scale * x + offset, ``(C,)`` each, in float32 or float64."""
    mean, var = bn.running_mean, bn.running_var
    dtype = torch.promote_types(mean.dtype, torch.float32)  # type: ignore[union-attr, arg-type]
    scale = torch.rsqrt(var.to(dtype) + bn.eps)  # type: ignore[union-attr, operator]
    if bn.weight is not None:
        scale = scale * bn.weight.to(dtype)  # type: ignore[operator]
    offset = -mean.to(dtype) * scale  # type: ignore[union-attr, operator]
    return scale, offset if bn.bias is None else offset + bn.bias.to(dtype)  # type: ignore[operator]


def total(biases: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """Sum of the biases that exist, rounded once to the dtype of the bank; None where none does."""
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    found = reduce(add, given)
    return found if found.dtype is dtype else found.to(dtype)  # asking takes a tenth of the time
