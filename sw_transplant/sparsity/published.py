"""What the official programs do where ours is stricter: ``FilterSparsity(dynamics="published")``.

To compare a run with theirs, point by point: docs/sparsity.md has the table, with the reasons for ours. Random numbers
are of our own generator, so that counts follow the same rules and draws differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sw_transplant.find.match import NoLargeKernelError
from sw_transplant.layers.shared_bank import TilePath
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.sparsity.exact import uniform
from sw_transplant.sparsity.masked_layers import MaskedLayer, trainable_layers

Dynamics = Literal["exact", "published"]
LAST_RATE = 0.005
"""What the share that is exchanged falls to."""
DENSE = 0.99
"""From which density on a layer is left unmasked for good."""
_LEFT_DENSE = "filter_sparsity_dense"
"""Entry of the optimizer's first parameter group: which layers those are, by number."""


def published_layers(model: nn.Module, *, only_L: bool) -> list[list[MaskedLayer]]:
    """What the official programs mask.

    Single weights: of SLaK's strips, laid out or not, and with ``only_L=False`` of every convolution and linear layer.
    Filters of the paper's module with ``only_L``; without it, in a network of that module, the weights of the pointwise
    layers (``pwconv``) and nothing else.

    Raises:
        NoLargeKernelError: there is nothing to mask.
        NotImplementedError: parameters that are sharded over processes.
    """
    is_shiftwise = any(isinstance(module, SWConv2d) for module in model.modules())
    groups = trainable_layers(model, only_L=only_L)
    if is_shiftwise and not only_L:
        groups = [group for group in groups if any(part.startswith("pwconv") for part in group[0].path.split("."))]
        if not groups:
            raise NoLargeKernelError(
                "FilterSparsity: no pointwise layer (pwconv1, pwconv2), which is what the published programs mask in a "
                "network of the paper's modules with only_L=False; use only_L=True, or dynamics='exact'"
            )
    return [
        [replace(layer, by_weight=layer.by_weight or not isinstance(layer.owner, TilePath)) for layer in group]
        for group in groups
    ]


def first_masks(
    scores: dict[MaskedLayer, Tensor], density: float, rng: np.random.Generator
) -> dict[MaskedLayer, Tensor]:
    """One threshold over all layers gives each a density; each unit of it is then in use with that probability.

    Args:
        scores: of every layer, each path by itself, in the shape ``layer.units``.
        density: the share of all units that is kept.
        rng: draws, layer by layer.

    Returns:
        The masks; all in use in layers that are dense enough to be left unmasked.
    """
    together = torch.cat([score[layer.possible] for layer, score in scores.items()])
    count = int(len(together) * density)
    threshold = together.topk(count).values[-1] if count else together.max()
    masks = {}
    for layer, score in scores.items():
        possible = layer.possible
        share = (score[possible] > threshold).float().mean().item()
        mask = (uniform(rng, score) < share) & possible
        if int(mask.sum()) >= DENSE * int(possible.sum()):
            mask = possible.clone()
        masks[layer] = mask
    return masks


def left_dense(layers: Sequence[MaskedLayer], optimizer: Any) -> set[MaskedLayer]:
    """The layers that are left unmasked for good: those that were in use as a whole when this was asked for first.

    The optimizer remembers them, so that a run that goes on later has the same ones, whatever has grown full since.
    """
    group = optimizer.param_groups[0]
    if _LEFT_DENSE not in group:
        group[_LEFT_DENSE] = [i for i, layer in enumerate(layers) if torch.equal(layer.mask_in_use, layer.possible)]
    return {layers[i] for i in group[_LEFT_DENSE]}


def forget_dense(optimizer: Any) -> None:
    """New first masks have been chosen; ``optimizer`` is None where none is attached yet."""
    if optimizer is not None:
        optimizer.param_groups[0].pop(_LEFT_DENSE, None)


def renewed_masks(
    parts: Sequence[Sequence[MaskedLayer]], rate: float, rng: np.random.Generator
) -> dict[MaskedLayer, Tensor]:
    """The next masks: first every layer is pruned, then every layer grows.

    Args:
        parts: layers that are renewed together and get one mask: that of the first one, renewed.
        rate: the share that goes.
        rng: draws, part by part.
    """
    kept, removed = [], []
    for part in parts:
        used = part[0].mask_in_use
        possible = part[0].possible
        magnitude = torch.stack([layer.sums(layer.weight) for layer in part]).sum(0)[possible]
        remaining = used[possible].clone()
        before = int(remaining.sum())
        going = len(remaining) - before + math.ceil(rate * before)  # the idle ones are the smallest
        remaining[magnitude.argsort(stable=True)[:going]] = False
        mask = torch.zeros_like(used)
        mask[possible] = remaining
        kept.append(mask)
        removed.append(before - int(remaining.sum()))
    masks: dict[MaskedLayer, Tensor] = {}
    for part, mask, count in zip(parts, kept, removed, strict=True):
        free = part[0].possible & ~mask
        idle = int(free.sum())
        if idle:
            mask = mask | (free & (uniform(rng, mask) < count / idle))
        masks |= dict.fromkeys(part, mask)
    return masks


def published_rate(first: float, step: int, total_steps: int | None) -> float:
    """Half a cosine from the first rate to :data:`LAST_RATE`."""
    if total_steps is None:
        return first
    share = min(1.0, step / total_steps)
    return LAST_RATE + (first - LAST_RATE) * (1 + math.cos(math.pi * share)) / 2


@torch.no_grad()
def zero_idle(layers: Sequence[MaskedLayer], optimizer: Any) -> None:
    """Zeros for what is out of use: weights, and SGD's momentum; moments of AdamW go on, as published."""
    for layer in layers:
        idle = layer.spread(~layer.mask_in_use)
        layer.weight.masked_fill_(idle, 0)
        momentum = optimizer.state.get(layer.weight, {}).get("momentum_buffer") if optimizer else None
        if isinstance(momentum, Tensor):
            momentum.masked_fill_(idle, 0)
