"""What a model is made of, before or after conversion, as tables."""

from __future__ import annotations

from typing import cast

from torch import nn

from sw_transplant.config import SWConfig
from sw_transplant.find.search import inspect_model
from sw_transplant.find.select import Select
from sw_transplant.layers.branch import Branch
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.tables import render_table


def summary(model: nn.Module, config: SWConfig | None = None, *, select: Select = None) -> str:
    """A model before or after conversion as tables: what would be converted, what is, and what is left and why.

    Args:
        model: any module, converted or not.
        config, select: as for :func:`convert`.

    Returns:
        Text. For Shiftwise layers: kernels, tiles, parameters, the share of the original kernels' energy that they keep
        (all of it in mode ``"laid_out"``), the squared error of their responses on calibration images relative to the
        original's, where there were some, the form asked for, and which one ran last and why (:mod:`dispatch`). The
        error of the responses says more of accuracy than the energy of the kernels.
    """
    parts = []
    if any(isinstance(module, ShiftwiseConv2d) for module in model.modules()):
        parts.append(_shiftwise_table(model))
    inspection = inspect_model(model, config, select=select)
    if inspection.matches or inspection.skipped or not parts:
        parts.append(str(inspection))
    return "\n".join(parts)


def _shiftwise_table(model: nn.Module) -> str:
    """One row per Shiftwise layer: kernels, tiles, parameters, and how it runs."""
    rows, total = [], 0
    specs = [module.spec for module in model.modules() if isinstance(module, ShiftwiseConv2d) and module.spec]
    calibrated = any(spec.response_error is not None for spec in specs)
    for path, module in model.named_modules():
        if not isinstance(module, ShiftwiseConv2d):
            continue
        parameters = sum(parameter.numel() for parameter in module.parameters())
        total += parameters
        branches = cast("list[Branch]", list(module.branches))
        rows.append(
            [
                path or "(the model)",
                " + ".join("x".join(map(str, branch.geometry.kernel_size)) for branch in branches),
                "x".join(map(str, module.stride)),
                str(module.out_channels),
                " + ".join(_tiles(branch) for branch in branches),
                f"{parameters:,}",
                "all" if module.spec is None else f"{module.spec.energy_kept:.1%}",
                *([_response_error(module)] if calibrated else []),
                module.form + (", frozen" if module.frozen else ""),
                *(module.decision or ("not run yet", "")),
            ]
        )
    errors = ["error of the response"] if calibrated else []
    headers = ["layer", "kernels", "stride", "channels", "tiles", "parameters", "energy kept", *errors]
    headers += ["form", "ran", "because"]
    rows.append([f"{len(rows)} layers", "", "", "", "", f"{total:,}", *[""] * (len(headers) - 6)])
    table = render_table("Shiftwise layers", headers, rows)
    for same, count in sorted({spec.agreement for spec in specs if spec.agreement}):
        table += f"\nThe original's class on {same} of {count} images that were held out of the calibration."
    return table


def _response_error(module: ShiftwiseConv2d) -> str:
    known = None if module.spec is None else module.spec.response_error
    return "" if known is None else f"{known:.1%}"


def _tiles(branch: Branch) -> str:
    if branch.is_identity:
        return "identity"
    _, count, side, _ = branch.bank.shape
    return f"{count} of {side}x{side}"
