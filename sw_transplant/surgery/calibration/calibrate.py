"""Calibration: the paper's modules fitted to the responses of the layers that they replace, one after the other.

In the order of execution. A layer's input comes from the network converted so far, its target from the original: so
each module also makes up for what those before it got wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sw_transplant.config import SWConfig
from sw_transplant.find.candidate import build, check_parameters, find_site
from sw_transplant.find.keep import keep_attributes
from sw_transplant.find.match import Match
from sw_transplant.find.shared import active_count, shared_tile
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.surgery.approximate import build_shared
from sw_transplant.surgery.calibration.budget import global_budget
from sw_transplant.surgery.calibration.compensation import Kept
from sw_transplant.surgery.calibration.images import Images, read_images
from sw_transplant.surgery.calibration.layer import fit_module
from sw_transplant.surgery.calibration.options import Calibration, CalibrationReport
from sw_transplant.surgery.calibration.paused import side_by_side
from sw_transplant.surgery.calibration.progress import progress_bar
from sw_transplant.surgery.calibration.refit import refit_after
from sw_transplant.surgery.calibration.responses import Ask, Seen, Visit, run_pairs, visits
from sw_transplant.surgery.calibration.sensitivity import sensitivities
from sw_transplant.surgery.calibration.statistics import set_statistics
from sw_transplant.surgery.calibration.sums import Sums
from sw_transplant.surgery.calibration.synthetic import image_shape, synthesise
from sw_transplant.surgery.origin import remember


@torch.no_grad()
def calibrate(
    original: nn.Module, target: nn.Module, matches: Sequence[Match], config: SWConfig, calibration: Calibration
) -> nn.Module:
    """Puts calibrated modules into a copy of a model.

    Args:
        original: the model; it runs, and is as it was afterwards.
        target: a copy of it, changed in place.
        matches: what to replace.
        config: of mode ``"shiftwise"``.
        calibration: the images, and how to use them.

    Returns:
        ``target``, or the module that takes its place.

    Raises:
        ValueError: the images are not what they should be, do not reach a layer, or have too few positions for it.
    """
    images = read_calibration(original, calibration)
    sites = {match.path: find_site(original, match.path) for match in matches}
    met = _check(original, images, matches, sites, config)
    order = sorted(matches, key=lambda match: met[match.path].rank)
    calibration.report.layers.clear()
    calibration.report.notes.clear()
    many = any(visit.calls > 1 for visit in met.values())
    bar = progress_bar(calibration.progress, len(order) + 1, "calibrating")
    # Modules draw filters before they get theirs: hence the fork.
    with bar as step, torch.random.fork_rng(devices=[]), ExitStack() as undo:
        step("sensitivity")
        weights: dict[str, Tensor] = {}
        if calibration.fit == "responses":
            weights, calibration.report.notes[:] = sensitivities(original, images, sites, config.seed)
        ghosts = {match.path: match.out_channels - active_count(match.out_channels, config) for match in order}
        if config.ghost_budget == "global" and calibration.fit == "responses":
            step("budget of ghosts")
            ghosts = global_budget(original, images, order, weights, ghosts, calibration.mix)
        waiting = None
        if calibration.fit == "responses" and not calibration.refit and not many:
            waiting = undo.enter_context(side_by_side(original, target, images, [match.path for match in order], met))
        for match in order:
            step(match.path)
            site = find_site(target, match.path)
            plain = build(site, match, form=config.form)
            if calibration.fit == "kernels":
                module = build_shared(plain, match, config)
            else:
                sums, kept = Sums(match.path, max(plain.kernel_size), shared_tile(config), match.stride), Kept()
                if waiting is not None:
                    waiting.collect(target, match.path, [sums, kept])
                else:
                    _collect(original, target, match.path, images, many, [sums, kept])
                module, report = fit_module(
                    plain, match, sums, kept, weights[match.path], ghosts[match.path], config, calibration
                )
                calibration.report.layers.append(report)
            keep_attributes(module, site, match)
            module.nonfinite = config.nonfinite
            remember(module, site, match)
            target = _put(target, match, module)
            if waiting is not None:
                waiting.placed(match.path, module)
            if calibration.refit and match.path and calibration.fit == "responses":
                done = refit_after(original, target, match.path, images)
                calibration.report.layers[-1] = replace(calibration.report.layers[-1], refitted=tuple(done))
    if calibration.fit == "kernels":
        set_statistics(target, images)
    _count_agreement(original, target, images, calibration.report)
    return target


def read_calibration(model: nn.Module, calibration: Calibration) -> Images:
    """The images of a calibration, checked; made where they are ``"synthetic"``."""
    data = calibration.images
    if isinstance(data, str) and data == "synthetic":
        shape = image_shape(model, calibration.input_size)
        data = synthesise(model, shape, calibration.count, progress=calibration.progress)
    return read_images(data, calibration.batch_size, calibration.held_out)


def _check(
    model: nn.Module, images: Images, matches: Sequence[Match], sites: dict[str, nn.Module], config: SWConfig
) -> dict[str, Visit]:
    """Which layers the images reach. Whether that is enough shows once all have been through; here: whether any do."""
    for match in matches:
        check_parameters(sites[match.path], match, mode=config.mode)
    met = visits(model, images, sites)
    if missing := sorted(sites.keys() - met.keys()):
        raise ValueError(
            f"calibration: the images do not reach {missing}; give images or a function that run the model through "
            "these layers, or leave them out with select=..."
        )
    for path, visit in met.items():
        if wrong := next((tuple(shape) for shape in visit.inputs if len(shape) != 4), None):
            raise ValueError(
                f"{path or 'model'}: the images reach this layer as {wrong}, expected maps (B, C, H, W): run the model "
                "on batches"
            )
    return met


def _collect(
    original: nn.Module, target: nn.Module, path: str, images: Images, whole: bool, into: Sequence[Any]
) -> None:
    """What a layer gets in the network converted so far, and what the original's gives."""

    def use(before: Seen, now: Seen) -> None:
        inputs, targets = now.get("x", []), before.get("y", [])
        if len(inputs) != len(targets):
            raise ValueError(
                f"{path or 'model'}: the original calls this layer {len(targets)} times and the converted network "
                f"{len(inputs)} times, expected as often; calibrate on images that take the same way through both, run "
                "the model itself and no part of it, or leave the layer out with select=..."
            )
        for x, y in zip(inputs, targets, strict=True):
            for each in into:
                each.add(x, y)

    of_original: Ask = {"y": (find_site(original, path), "output")}
    of_converted: Ask = {"x": (find_site(target, path), "input")}
    run_pairs(original, target, images, of_original, of_converted, use, whole=whole)


def _put(target: nn.Module, match: Match, module: SWConv2d) -> nn.Module:
    """Puts one module into all its places."""
    if match.path == "":
        return module
    for place in (match.path, *match.aliases):
        parent, _, name = place.rpartition(".")
        find_site(target, parent)._modules[name] = module
    return target


@torch.no_grad()
def _count_agreement(original: nn.Module, target: nn.Module, images: Images, report: CalibrationReport) -> None:
    """Runs both networks on the images that were held out, and notes it in the report and with every layer."""
    same = count = 0

    def use(before: Seen, now: Seen) -> None:
        nonlocal same, count
        for a, b in zip(before.get("out", ()), now.get("out", ()), strict=True):
            same, count = same + int((a.argmax(1) == b.argmax(1)).sum()), count + len(a)

    run = next(images.runs(held_out=True), None)
    report.agreement = None
    if run is None:
        return
    run_pairs(original, target, images, {"out": (original, "logits")}, {"out": (target, "logits")}, use, held_out=True)
    if count:
        report.agreement = (same, count)
        for module in target.modules():
            if isinstance(module, SWConv2d) and module.spec is not None:
                module.spec = replace(module.spec, agreement=report.agreement)
