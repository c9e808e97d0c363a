"""Averages of weights that stay as sparse as the model: what an average of moving masks would fill up."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sw_transplant.sparsity.masked_layers import masked_layers

_FILLS_UP = ("ModelEma", "ModelEmaV2")


@torch.no_grad()
def apply_masks(model: nn.Module) -> None:
    """Sets to zero, in place, what the masks of a model have out of use."""
    for group in masked_layers(model, only_L=False):
        for layer in group:
            if layer.mask is not None:
                layer.weight.masked_fill_(~layer.spread(layer.mask), 0)


def follow_masks(ema: Any) -> Any:
    """Makes timm's ``ModelEmaV3`` average what is in use alone: after each update, idle weights are zero.

    An average keeps what has been in use at any time: while masks move it fills up. ``ModelEmaV3`` copies masks, so
    that filters stay out of use; single weights of ordinary layers, whose masks do not act in a forward, need this.

    Args:
        ema: a ``timm.utils.ModelEmaV3`` of a model with masks.

    Returns:
        The same object; its ``update`` also applies the masks.

    Raises:
        ValueError: a ``ModelEmaV2`` or ``ModelEma``: they average masks like numbers, and after some time every filter
            is in use.

    Example:
        >>> ema = follow_masks(timm.utils.ModelEmaV3(model, decay=0.9999))                   # doctest: +SKIP
    """
    name = type(ema).__name__
    if name in _FILLS_UP:
        raise ValueError(
            f"follow_masks: {name} averages masks like numbers, so that what was once in use stays in use; expected "
            "timm.utils.ModelEmaV3"
        )
    if not isinstance(getattr(ema, "module", None), nn.Module) or not callable(getattr(ema, "update", None)):
        raise ValueError(f"follow_masks: got {name}, expected timm.utils.ModelEmaV3")
    update = ema.update

    def update_and_apply(*args: Any, **kwargs: Any) -> Any:
        result = update(*args, **kwargs)
        apply_masks(ema.module)
        return result

    ema.update = update_and_apply
    return ema
