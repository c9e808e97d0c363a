"""Every converted layer of a model side by side: tiles in use, outputs in use, rounding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from sw_transplant.check.rounding import LayerRounding
from sw_transplant.geometry import Size
from sw_transplant.layers.placed_tiles import PlacedTiles
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.report.figures import bars
from sw_transplant.science.utilisation import utilisation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_sparsity(model: nn.Module) -> Figure:
    """For each converted layer the share of its tiles that are in use: not masked, and not zero in every tap.

    Args:
        model: a converted model.

    Raises:
        ValueError: the model has no converted layer.
        ImportError: matplotlib is not installed.
    """
    layers = _layers(model, "plot_sparsity")
    shares = [share_in_use(layer) for layer in layers.values()]
    return bars(
        "Tiles in use", list(layers), {"tiles in use": [100 * share for share in shares]}, "percent", ".0f", end=100
    )


@torch.no_grad()
def share_in_use(layer: ShiftwiseConv2d) -> float:
    """Share of the tiles, over all channels and banks, that are neither masked nor zero in every tap."""
    used = count = 0
    banks: dict[int, PlacedTiles] = {}
    for branch in layer.parts():
        if not branch.is_identity:
            banks.setdefault(branch.bank.data_ptr(), branch)
    for branch in banks.values():
        mask = getattr(branch, "mask", None)
        there = branch.bank.flatten(2).ne(0).any(2)  # (C, T)
        used += int((there if mask is None else there & mask.to(there.device)).sum())
        count += there.numel()
    return used / max(count, 1)


def plot_utilisation(model: nn.Module, map_sizes: int | Mapping[str, int | Size]) -> Figure:
    """For each converted layer the share of the small convolutions' outputs that reach its output.

    Args:
        model: a converted model.
        map_sizes: of the maps that the layers get: by path, or one for all of them.

    Raises:
        ValueError: the model has no converted layer, or there is a map that is too small for one.
        ImportError: matplotlib is not installed.
    """
    layers = _layers(model, "plot_utilisation")
    if isinstance(map_sizes, Mapping):
        layers = {path: layer for path, layer in layers.items() if path in map_sizes}
    shares, names = [], []
    for path, layer in layers.items():
        size = map_sizes[path] if isinstance(map_sizes, Mapping) else map_sizes
        shares.append(100 * utilisation(layer, size).total)
        names.append(f"{path or '(the model)'}, map {'x'.join(map(str, (size,) if isinstance(size, int) else size))}")
    return bars("Outputs of small convolutions that are used", names, {"used": shares}, "percent", ".0f", end=100)


def plot_rounding(layers: Iterable[LayerRounding]) -> Figure:
    """For each layer the largest rounding error, as a share of the bound that is proven for it.

    Args:
        layers: of :func:`sw_transplant.check.rounding.measure_layers`; those without a bound are left out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    known = [layer for layer in layers if layer.bound and layer.largest_error is not None]
    shares = [100 * layer.largest_error / layer.bound for layer in known]  # type: ignore[operator]
    names = [f"{layer.path or '(the model)'} ({layer.ran}, {layer.dtype})" for layer in known]
    return bars("Largest rounding error", names, {"error": shares}, "percent of the proven bound", ".2g")


def _layers(model: nn.Module, caller: str) -> dict[str, ShiftwiseConv2d]:
    layers = {path: module for path, module in model.named_modules() if isinstance(module, ShiftwiseConv2d)}
    if not layers:
        raise ValueError(
            f"{caller}: {type(model).__name__} has no converted layer, expected a model from convert(model)"
        )
    return layers
