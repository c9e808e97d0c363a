"""Masks that come with weights: from zeros, or from a file that has them.

Published sparse networks hold zeros, and no masks. What was trained here holds both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from sw_transplant.layers.branch import Branch
from sw_transplant.layers.masks import MaskedTiles
from sw_transplant.layers.shared_bank import TilePath

ELEMENT_MASK = "sparsity_mask"
"""Buffer of an ordinary convolution or linear layer: which of its weights are in use, bool, of the weight's shape."""

ORDINARY = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose single weights can be out of use."""


@torch.no_grad()
def mask_zeros(model: nn.Module, *, only_L: bool = True) -> tuple[int, int]:
    """Takes every filter that is all zero out of use, and every other into use.

    Layers without zeros get no mask, unless they have one.

    Args:
        model: changed in place; its weights stay as they are.
        only_L: filters of large kernels only. False: those of small ones too, and single weights of ordinary
            convolutions and linear layers.

    Returns:
        How many units are out of use, and of how many.
    """
    idle = total = 0
    for module in model.modules():
        for used in _in_use(module, only_L):
            idle, total = idle + int((~used).sum()), total + used.numel()
            if isinstance(module, MaskedTiles):
                if module.mask is not None or not bool(used.all()):
                    module.set_mask(used)
            elif hasattr(module, ELEMENT_MASK):
                getattr(module, ELEMENT_MASK).copy_(used)
            elif not bool(used.all()):
                module.register_buffer(ELEMENT_MASK, used)
    return idle, total


def masks_for(modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Which weights of a file are masks that a layer could have, and has not; with these layers.

    Args:
        modules: layers by their paths.
        weights: of the file.
    """
    found: dict[str, nn.Module] = {}
    for name, tensor in weights.items():
        path, _, last = name.rpartition(".")
        module = modules.get(path)
        if last == "mask" and isinstance(module, MaskedTiles):
            absent, shape = module.mask is None, module.tile_count
        elif last == ELEMENT_MASK and isinstance(module, (*ORDINARY, Branch)):
            weight = module.bank if isinstance(module, Branch) else module.weight
            absent, shape = not hasattr(module, ELEMENT_MASK), weight.shape
        else:
            continue
        if absent and tensor.dtype is torch.bool and tensor.shape == shape:
            found[name] = module
    return found


def put_masks(owners: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
    """Gives layers the masks that :func:`masks_for` found."""
    for name, module in owners.items():
        mask = weights[name].to(next(module.parameters()).device)
        if isinstance(module, MaskedTiles) and not name.endswith(ELEMENT_MASK):
            module.set_mask(mask)
        else:
            module.register_buffer(ELEMENT_MASK, mask)


def _in_use(module: nn.Module, only_L: bool) -> Iterator[Tensor]:
    """Which units of a module are not all zero; nothing for a module that has none."""
    if isinstance(module, MaskedTiles):
        bank = module.bank if isinstance(module, Branch) else module.weight
        passes_on = isinstance(module, Branch) and module.is_identity
        if not passes_on and (isinstance(module, TilePath) or module.tile_count[1] > 1 or not only_L):
            yield (bank.reshape(*module.tile_count, -1) != 0).any(-1)  # type: ignore[union-attr, operator]
    elif not only_L and isinstance(module, ORDINARY) and isinstance(module._parameters.get("weight"), nn.Parameter):
        yield module.weight != 0
