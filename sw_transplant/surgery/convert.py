"""The surgery: from matches to ShiftwiseConv2d modules in the original tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sw_transplant.config import SWConfig, matches_pattern
from sw_transplant.find.candidate import build, check_parameters, find_site
from sw_transplant.find.keep import keep_attributes
from sw_transplant.find.match import Inspection, Match, NoLargeKernelError
from sw_transplant.find.search import inspect_model
from sw_transplant.find.select import Select
from sw_transplant.find.shared import shared_tile
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.surgery.approximate import build_shared
from sw_transplant.surgery.calibration.calibrate import calibrate
from sw_transplant.surgery.calibration.options import Calibration
from sw_transplant.surgery.copies import copy_whole, operand
from sw_transplant.surgery.hosts import hosts_of
from sw_transplant.surgery.origin import remember


def convert(
    model: nn.Module,
    config: SWConfig | None = None,
    *,
    select: Select = None,
    inplace: bool = False,
    calibration: Any = None,
) -> nn.Module:
    """Rewrites the large depthwise convolutions of a model into Shiftwise modules.

    In mode ``"laid_out"`` the function stays the same. Every large depthwise convolution becomes a
    :class:`ShiftwiseConv2d` that is laid out from its weights (exact, see :mod:`sw_transplant.equivalence`); a module
    whose forward is a sum of parallel ones becomes one, each convolution keeping its BatchNorm. The rest of the model
    stays what it is: class, forward, hooks, names and state of the other layers. Layers that are Shiftwise already are
    left alone. Create the optimizer after the conversion.

    In mode ``"shiftwise"`` each of these places gets the paper's module instead (:class:`sw_conv2d.SWConv2d`), as close
    to the original kernels as least squares can bring it. That changes the function: :func:`summary` tells which share
    of the kernels' energy is kept; fine-tune the model. With ``calibration`` images the modules are fitted to what the
    original layers answer on them instead, one after the other in the order of execution (docs/transplanting.md): some
    ten unlabelled images keep most of the accuracy. Where all layers are Shiftwise already, and have another
    configuration than this mode asks for, nothing would happen: that is an error.

    Args:
        model: any module; call :func:`inspect_model` to see what will be converted, and what not and why.
        config: what to look for and how to run it; None for ``SWConfig()``.
        select: glob patterns of layer paths, or a function ``(path, module) -> bool``; None for all.
        inplace: change ``model`` itself instead of a deep copy.
        calibration: of mode ``"shiftwise"``: unlabelled images. A tensor (N, C, H, W), preprocessed; a list or
            DataLoader of such tensors, of pairs (images, labels) or of dicts for the forward; a function that runs the
            model it is given; ``"synthetic"`` where there are no images; or a :class:`Calibration` with any of these
            and with settings, which then holds the report. The model runs in eval mode, many times.

    Returns:
        The converted model: a copy, or with ``inplace`` the model itself. Where the model as a whole is such a
        convolution, its replacement.

    Raises:
        NoLargeKernelError: there is nothing to convert, and nothing was converted before.
        ValueError: ``model`` or an argument is not what it should be; calibration images that are none, are not finite,
            do not reach a layer, or are too few for it; Shiftwise layers that would have to change.

    In every case of an error the model is left as it was.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(8, 8, 31, padding=15, groups=8), nn.ReLU())
        >>> convert(model)[0].kernel_size
        (31, 31)
    """
    config = SWConfig() if config is None else config
    _refuse_wrappers(model)
    inspection = inspect_model(model, config, select=select)  # which refuses what is no configuration
    if not inspection.matches and not inspection.converted:
        raise NoLargeKernelError(_nothing_found(inspection, config))
    if not inspection.matches:
        _refuse_other_modules(model, config)
    _check_patterns(inspection, config)
    hosts = hosts_of(model)
    for host in hosts:
        host.check(model)
    if calibration is not None or config.ghost_budget == "global":
        converted = _convert_calibrated(model, inspection, config, calibration, inplace)
        for match in inspection.matches:
            _set(find_site(converted, match.path), match, config)  # type: ignore[arg-type]
        for host in hosts:
            host.follow(converted)
        return converted
    target = operand(model, inplace=inplace)
    built = [(match, _build_for(find_site(target, match.path), match, config)) for match in inspection.matches]
    converted = put(target, built)
    for host in hosts:
        host.follow(converted)
    return converted


def _convert_calibrated(
    model: nn.Module, inspection: Inspection, config: SWConfig, calibration: Any, inplace: bool
) -> nn.Module:
    """What runs is the model and a copy that is converted layer by layer; in place, its parts then go over."""
    if config.mode != "shiftwise":
        raise ValueError(
            f"convert: calibration with mode {config.mode!r}, whose function is exact; expected mode 'shiftwise'"
        )
    if config.residual is False or config.orders != "random":
        raise ValueError(
            f"convert: calibration with residual={config.residual} and orders={config.orders!r}; "
            "expected residual True or 'auto', and 'random' orders, among which it chooses"
        )
    if calibration is None:
        raise ValueError("convert: ghost_budget 'global' compares layers by their responses; give calibration=images")
    try:
        twin = copy_whole(model)
    except ValueError as error:
        raise ValueError(
            f"convert: calibration converts a copy, in place, too, and this model has none: {error}; expected a model "
            "that copy.deepcopy copies whole"
        ) from error
    settings = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
    converted = calibrate(model, twin, inspection.matches, config, settings)
    if not inplace:
        return converted
    built = [(match, find_site(converted, match.path)) for match in inspection.matches]
    refitted = [find_site(converted, each.path).state_dict() for each in settings.report.refitted]
    result = put(model, built)  # type: ignore[arg-type]
    for each, state in zip(settings.report.refitted, refitted, strict=True):
        find_site(model, each.path).load_state_dict(state)
    return result


def put(model: nn.Module, built: Sequence[tuple[Match, ShiftwiseConv2d]]) -> nn.Module:
    """Puts built modules in the places that their matches name: all of them, or, if anything fails, none.

    Args:
        model: changed in place.
        built: matches with what takes their place.

    Returns:
        The model, or the new module where a match is the model itself.

    Raises:
        ValueError: the model has no such place.
    """
    undo: list[tuple[nn.Module, str, nn.Module | None]] = []
    try:
        for match, module in built:
            if match.path == "":
                return module
            for place in (match.path, *match.aliases):
                parent_path, _, name = place.rpartition(".")
                parent = find_site(model, parent_path)
                find_site(parent, name)
                undo.append((parent, name, parent._modules[name]))
                parent._modules[name] = module
    except BaseException:
        for parent, name, original in reversed(undo):
            parent._modules[name] = original
        raise
    return model


def _build_for(site: nn.Module, match: Match, config: SWConfig) -> ShiftwiseConv2d:
    check_parameters(site, match, mode=config.mode)
    layer = build(site, match, form=config.form)
    if config.mode == "shiftwise":
        layer = build_shared(layer, match, config)
        keep_attributes(layer, site, match)
    _set(layer, match, config)
    remember(layer, site, match)
    return layer


def _set(layer: ShiftwiseConv2d, match: Match, config: SWConfig) -> None:
    for name, value in config.settings_for(match.path).items():
        setattr(layer, name, value)


def _check_patterns(inspection: Inspection, config: SWConfig) -> None:
    paths = [*(match.path for match in inspection.matches), *inspection.converted]
    for pattern in config.patterns:
        if not any(matches_pattern(path, pattern) for path in paths):
            raise ValueError(f"SWConfig.layers: {pattern!r} names no layer that is converted; see inspect_model(model)")


_WRAPPERS = {
    "DistributedDataParallel": "DistributedDataParallel",
    "FullyShardedDataParallel": "FullyShardedDataParallel",
    "OptimizedModule": "torch.compile",
}


def _refuse_wrappers(model: nn.Module) -> None:
    """What wraps a model has taken hold of its parameters or its code: converting beneath it would go unnoticed."""
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if (wrapper := _WRAPPERS.get(type(module).__name__)) is not None:
            raise ValueError(
                f"{path or 'model'}: it is wrapped by {wrapper}, expected a plain model; convert first, then wrap it"
            )


def _refuse_other_modules(model: nn.Module, config: SWConfig) -> None:
    """Says that nothing would happen: all layers are Shiftwise already, and some not as the configuration says."""
    if config.mode != "shiftwise":
        return
    for path, module in model.named_modules():
        if isinstance(module, ShiftwiseConv2d) and (difference := _difference(module, config)):
            raise ValueError(
                f"{path or 'model'}: it is Shiftwise already, with {difference}; convert leaves such layers as they "
                "are. Build the network with these settings (sw_transplant.science.ladder), or convert the original"
            )


def _difference(module: ShiftwiseConv2d, config: SWConfig) -> str:
    """What a module has another way than a configuration of mode ``"shiftwise"``; empty for nothing."""
    if not isinstance(module, SWConv2d):
        return "kernels that are laid out instead of mode 'shiftwise'"
    if module.merged:
        return "its kernels merged"
    pairs = {
        "tile": (module.tile, shared_tile(config)),
        "edges": (module.edges, config.edge_count),
        "paths": (len(module.paths), config.paths),
    }
    for name, (own, wanted) in pairs.items():
        if own != wanted:
            return f"{name}={own} instead of {wanted}"
    if config.residual not in ("auto", module.residual):
        return f"residual={module.residual} instead of {config.residual}"
    # Rounding to whole or even numbers of channels differs between the published networks.
    wanted_ghosts = config.ghost * module.in_channels
    far = abs(len(module.ghosts) - wanted_ghosts) > 2 or bool(len(module.ghosts)) != bool(config.ghost)
    if config.ghost_budget == "layer" and far:
        return f"{len(module.ghosts)} ghosts of {module.in_channels} channels instead of {wanted_ghosts:.0f}"
    return ""


def _nothing_found(inspection: Inspection, config: SWConfig) -> str:
    message = f"no depthwise convolution with a kernel of {config.min_kernel} or more taps can be converted"
    if not inspection.skipped:
        return message + "; lower min_kernel, or see inspect_model(model)"
    return f"{message}:\n{inspection}"
