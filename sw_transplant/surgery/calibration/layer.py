"""One layer: from the sums over its maps to the module that takes its place."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from sw_transplant.config import SWConfig
from sw_transplant.find.match import Match
from sw_transplant.forms import add_kernels, embed
from sw_transplant.geometry import Extent, enclose
from sw_transplant.layers.orders import Orders
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.surgery.approximate import SharedSpec, finish_shared, split_bank
from sw_transplant.surgery.calibration.compensation import Kept, all_offsets, compensate, costs_together
from sw_transplant.surgery.calibration.fit import (
    Fit,
    Problem,
    fit_layer,
    kernel_distance,
    pose,
    whole_taps,
)
from sw_transplant.surgery.calibration.ghosts import cheapest, exchange
from sw_transplant.surgery.calibration.moments import Moments, Taps
from sw_transplant.surgery.calibration.options import Calibration, LayerReport
from sw_transplant.surgery.calibration.orders import choose_orders
from sw_transplant.surgery.calibration.statistics import write_norms
from sw_transplant.surgery.calibration.sums import Sums


def fit_module(
    plain: ShiftwiseConv2d,
    match: Match,
    sums: Sums,
    kept: Kept,
    weights: Tensor,
    ghosts: int,
    config: SWConfig,
    calibration: Calibration,
) -> tuple[SWConv2d, LayerReport]:
    """The module of the paper whose responses come closest to those of a layer.

    Args:
        plain: the layer, laid out.
        match: what it replaces.
        sums, kept: of its input in the network converted so far, and its output in the original.
        weights: what errors of its channels cost, ``(C, C)``.
        ghosts: how many channels bypass the module.
        config, calibration: what was asked for.

    Raises:
        ValueError: the images have too few positions for the taps that reach them.
    """
    if sums.positions <= sums.reaching:
        raise ValueError(
            f"{match.path or 'model'}: {sums.positions} positions (images times outputs of a channel) cannot tell "
            f"{sums.reaching} taps of a channel apart; expected more than that: give more images, or larger ones"
        )
    problem = pose_for(plain, sums, calibration.ridge)
    choice = choose_orders(
        problem, config.edge_count, config.seed, candidates=calibration.candidates, swaps=calibration.swaps
    )
    orders, residual = choice.orders, choice.residual
    fit = fit_layer(problem, orders, residual)
    missed = (problem.moments.passed - fit.error) * weights.diagonal().to(fit.error)
    bypass = cheapest(missed, ghosts)
    if calibration.mix:
        with torch.autocast(problem.gram.device.type, enabled=False):
            maps = kept.posed(problem)
            bypass = exchange(bypass, *costs_together(problem, fit, maps, weights, calibration.mix))
            fit = compensate(problem, fit, orders, maps, bypass, weights, calibration.mix)
    active = torch.tensor([c for c in range(match.out_channels) if c not in set(bypass)], device="cpu")
    error = fit.error[active.to(fit.error.device)].sum() + problem.moments.passed[list(bypass)].sum()
    energy = problem.moments.target_squared.sum().clamp(min=torch.finfo(torch.float64).tiny)
    spec = SharedSpec(
        problem.taps.length, problem.taps.tile, config.edge_count, config.paths, bypass, residual, config.seed,
        _energy_kept(problem, fit, active, bypass), float(error / energy),
    )  # fmt: skip
    module = _make(plain, match, spec, fit, orders, problem.moments, active, config)
    centred = problem.energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
    drawn, chosen, least = (float(each.sum() / centred) for each in (choice.before, choice.after, choice.least))
    report = LayerReport(match.path, sums.positions, drawn, chosen, least, len(bypass), float(error / energy))
    return module, report


def pose_for(plain: ShiftwiseConv2d, sums: Sums, ridge: float) -> Problem:
    """The least-squares problem of a layer, towards whose kernel the ridge leads."""
    taps = Taps(sums.length, sums.tile, (1, 1), (1, 1), sums.stride)
    moments = sums.moments()
    kernel, energy = _kernel(plain, taps)
    return pose(moments, taps, kernel.to(moments.gram), energy.to(moments.gram), ridge)


def _kernel(plain: ShiftwiseConv2d, taps: Taps) -> tuple[Tensor, Tensor]:
    """The original's taps at the places of the strips' taps, ``(C, P)``, and the energy of all of them ``(C,)``."""
    dense = reduce(add_kernels, plain.kernels()[0])
    before = taps.length // 2
    outer = enclose(dense.extent, Extent((taps.whole, taps.whole), (before, before)))
    if outer.dilation != (1, 1):
        raise ValueError(f"calibration: a kernel of dilation {outer.dilation} on no common lattice with the strips")
    weight = embed(dense, outer).detach().double()[:, 0]
    offsets = all_offsets(taps).to(weight.device) + torch.tensor(outer.origin, device=weight.device)
    return weight[:, offsets[:, 0], offsets[:, 1]], weight.square().sum((1, 2))


def _make(
    plain: ShiftwiseConv2d,
    match: Match,
    spec: SharedSpec,
    fit: Fit,
    orders: Orders,
    moments: Moments,
    active: Tensor,
    config: SWConfig,
) -> SWConv2d:
    like = next(plain.parameters())
    module = spec.build(match, form=config.form, device=like.device, dtype=like.dtype)
    module.set_orders(*(order.cpu()[:, active] for order in orders))
    here = active.to(fit.bank.device)
    split_bank(fit.bank[here].cpu(), module, config.seed)
    of_active = moments.select(here)
    write_norms(module, fit.parts[here], of_active, fit.scales[here], fit.bias[here])
    return finish_shared(module, plain)


def _energy_kept(problem: Problem, fit: Fit, active: Tensor, ghosts: tuple[int, ...]) -> float:
    """As the least-squares conversion reports it: the share of the kernels' energy, whatever the images make of it."""
    taps = whole_taps(problem, fit)
    alone = torch.zeros_like(taps)
    alone[:, problem.taps.whole * -problem.taps.across.start - problem.taps.along.start] = 1
    here = active.to(taps.device)
    lost = kernel_distance(problem, taps)[here].sum() + kernel_distance(problem, alone)[list(ghosts)].sum()
    total = float(problem.kernel_energy.sum())
    return float(1 - lost / total) if total > 0 else 1.0
