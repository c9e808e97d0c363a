"""SNIP: which units of a model matter most to the loss of one batch (SLaK, section 3 and appendix B.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sw_transplant.sparsity.masked_layers import MaskedLayer

Batch = Callable[[], Tensor] | tuple[Any, Any, Callable[[Any, Any], Tensor]]
"""A function that returns the loss of one batch, or ``(inputs, labels, loss)`` for ``loss(model(inputs), labels)``."""


def snip_scores(model: nn.Module, layers: Sequence[MaskedLayer], batch: Batch) -> list[Tensor]:
    """SNIP's sensitivity ``|g * w|``, averaged over each unit (SLaK, appendix B.1).

    Args:
        model: runs in the mode it is in. The ``grad`` of its parameters and its BatchNorms' statistics are left alone.
        layers: of :func:`sw_transplant.sparsity.masked_layers.masked_layers`; their weights take part as they are.
        batch: :data:`Batch`.

    Returns:
        For each layer a tensor of the shape ``layer.units``, float32 at least; zeros where the loss does not
        depend on it.

    Raises:
        ValueError: no scalar loss that depends on the model, or scores that are not finite.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        with torch.enable_grad():
            loss = batch() if callable(batch) else batch[2](model(batch[0]), batch[1])
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"FilterSparsity.initialise: the loss is {got}, expected one number with a gradient")
            gradients = torch.autograd.grad(loss.sum(), [layer.weight for layer in layers], allow_unused=True)
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
    with torch.no_grad():
        scores = [
            layer.means(torch.zeros_like(layer.weight) if gradient is None else gradient * layer.weight)
            for layer, gradient in zip(layers, gradients, strict=True)
        ]
    for layer, score in zip(layers, scores, strict=True):
        if not bool(score.isfinite().all()):
            raise ValueError(
                f"{layer.path}: the gradient of the loss {float(loss.detach())} is not finite, "
                "expected finite gradients; check the batch, or compute in a higher precision"
            )
    if not any(bool(score.any()) for score in scores):
        raise ValueError(
            "FilterSparsity.initialise: the loss does not depend on any masked layer; expected that of this very model"
        )
    return scores


def above_one_threshold(scores: Sequence[Tensor], density: float) -> list[Tensor]:
    """Masks of the best units of all layers together: one threshold gives each layer a share of its own.

    Args:
        scores: a tensor of any shape for each layer, finite.
        density: the share of all units that is kept, 0 to 1. Each layer keeps its best one in any case.

    Returns:
        bool, of the shapes of the scores.
    """
    flat = []
    for score in scores:
        layer = score.flatten().clone()
        layer[layer.argmax()] = math.inf
        flat.append(layer)
    together = torch.cat([layer.to(flat[0]) for layer in flat])
    count = max(len(flat), round(density * len(together)))
    kept = best_units(together, torch.ones_like(together, dtype=torch.bool), count)
    parts = kept.split([len(layer) for layer in flat])
    return [part.view(score.shape).to(score.device) for part, score in zip(parts, scores, strict=True)]


def best_units(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """bool, True for the ``count`` highest of the scores that are ``among`` (bool); ties go to the first."""
    order = scores.masked_fill(~among, -math.inf).flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros_like(among).flatten()
    chosen[order[:count]] = True
    return chosen.view(among.shape)
