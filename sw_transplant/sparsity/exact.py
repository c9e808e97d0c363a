"""How an update renews a mask: the smallest go, others come, and their number stays what it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sw_transplant.sparsity.masked_layers import MaskedLayer
from sw_transplant.sparsity.snip import above_one_threshold, best_units


def first_masks(
    scores: Mapping[MaskedLayer, Tensor],
    groups: Sequence[Sequence[MaskedLayer]],
    density: float,
    rng: np.random.Generator,
    *,
    drawn: bool,
) -> dict[MaskedLayer, Tensor]:
    """The first masks: one threshold for large kernels, and one for the rest; parallel paths get a common mask.

    Args:
        scores: of each layer's units.
        groups: the paths of each module.
        density: the share of units that stays in use.
        rng: draws which stay, as many in each layer, if ``drawn``.
    """
    masks: dict[MaskedLayer, Tensor] = {}
    for large in (True, False):
        alike = [group for group in groups if group[0].large is large]
        if not alike:
            continue
        means = [torch.stack([scores[layer] for layer in group]).mean(0) for group in alike]
        for group, mask in zip(alike, above_one_threshold(means, density), strict=True):
            if drawn:
                mask = best_units(uniform(rng, mask), torch.ones_like(mask), int(mask.sum()))
            masks |= dict.fromkeys(group, mask)
    return masks


@torch.no_grad()
def put_masks(masks: Mapping[MaskedLayer, Tensor], optimizer: Any) -> None:
    """Puts masks in place. What was not in use both before and after starts from zero, in the optimizer's state too."""
    for layer, mask in masks.items():
        own, weight = layer.mask_in_use, layer.weight
        fresh = layer.spread(~(own & mask))
        own.copy_(mask)
        weight.masked_fill_(fresh, 0)
        for value in (optimizer.state.get(weight, {}) if optimizer else {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
                value.masked_fill_(fresh, 0)


def renewed_mask(
    layers: Sequence[MaskedLayer],
    rate: float,
    rng: np.random.Generator,
    gradients: Mapping[MaskedLayer, Tensor] | None,
    *,
    equal_paths: bool,
) -> Tensor:
    """The next mask of a layer, or the common one of parallel paths, with as many units as before.

    Args:
        layers: one, or the paths that get a common mask.
        rate: the share of the used units that is exchanged.
        rng: draws what grows, where ``gradients`` do not decide.
        gradients: sums of absolute gradients, in the shape ``layer.units``; None for growth at random.
        equal_paths: whether paths of unequal counts are refused, or get the mean count.

    Returns:
        bool, in the shape ``layer.units``.

    Raises:
        ValueError: paths of unequal counts.
    """
    magnitude = torch.stack([layer.sums(layer.weight) for layer in layers]).sum(0)  # magnitude_sum
    used, *others = [layer.mask_in_use for layer in layers]
    count = int(used.sum())
    if others:
        counts = [count, *(int(mask.sum()) for mask in others)]
        count = round(sum(counts) / len(counts))
        if equal_paths and len(set(counts)) > 1:
            raise ValueError(
                f"{layers[0].path}: the parallel paths do not use equally many filters, so that they cannot get a "
                "common mask; expected masks of FilterSparsity, call initialise(...)"
            )
        used = best_units(magnitude, torch.stack([used, *others]).any(0), count)
    # A filter just pruned does not grow at once: that would only set it to zero.
    exchanged = min(int(rate * count), used.numel() - count)
    kept = best_units(magnitude, used, count - exchanged)
    if gradients is None:
        promise = uniform(rng, used)
    else:
        promise = sum((gradients[layer] for layer in layers if layer in gradients), torch.zeros(()))
        promise = promise.to(used.device).expand(used.shape)
    return kept | best_units(promise, ~used, exchanged)


def uniform(rng: np.random.Generator, like: Tensor) -> Tensor:
    """Numbers from 0 to 1 in the shape of a tensor, on its device."""
    return torch.from_numpy(rng.random(tuple(like.shape))).to(like.device)
