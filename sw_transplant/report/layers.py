"""Every converted layer of a model side by side: tiles in use, outputs in use, rounding, errors of calibration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from sw_transplant.check.rounding import LayerRounding
from sw_transplant.geometry import Size
from sw_transplant.layers.placed_tiles import PlacedTiles
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.report.figures import bars
from sw_transplant.science.utilisation import utilisation
from sw_transplant.surgery.calibration.options import CalibrationReport

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


def plot_calibration(source: nn.Module | CalibrationReport) -> Figure:
    """For each layer that was calibrated the error of its responses on the images, relative to the original's.

    Args:
        source: a model from ``convert(..., calibration=...)``, also after ``save`` and ``load``: one bar for each
            layer, the whole module. Or the report of a :class:`Calibration`, which has more: beside it what the orders
            that were drawn and those that were chosen reach before ghosts, and the least that strips of this width can.

    Raises:
        ValueError: no layer was calibrated.
        ImportError: matplotlib is not installed.
    """
    title, axis = "Error of calibrated layers", "percent of the energy of the original's responses"
    if isinstance(source, CalibrationReport):
        names = [layer.path or "(the model)" for layer in source.layers]
        series: dict[str, Sequence[float]] = {
            "whole module": [100 * layer.response_error for layer in source.layers],
            "chosen orders": [100 * layer.orders_after for layer in source.layers],
            "drawn orders": [100 * layer.orders_before for layer in source.layers],
            "any strips of this width": [100 * layer.strips for layer in source.layers],
        }
    else:
        errors = response_errors(source)
        names = [path or "(the model)" for path in errors]
        series = {"whole module": [100 * error for error in errors.values()]}
    if not names:
        raise ValueError("plot_calibration: no layer was calibrated, expected a model from convert(calibration=...)")
    return bars(title, names, series, axis, ".3g")


def response_errors(model: nn.Module) -> dict[str, float]:
    """By the path of each layer that was calibrated the squared error of its responses, relative to the original's."""
    specs = {path: module.spec for path, module in model.named_modules() if isinstance(module, ShiftwiseConv2d)}
    errors = {path: getattr(spec, "response_error", None) for path, spec in specs.items()}
    return {path: error for path, error in errors.items() if error is not None}


def _layers(model: nn.Module, caller: str) -> dict[str, ShiftwiseConv2d]:
    layers = {path: module for path, module in model.named_modules() if isinstance(module, ShiftwiseConv2d)}
    if not layers:
        raise ValueError(
            f"{caller}: {type(model).__name__} has no converted layer, expected a model from convert(model)"
        )
    return layers
