"""Fitting the channels of a layer together: what some cannot give, others make up for.

Channel by channel, the best fit leaves errors: ghosts pass the map on as it is, and strips of width 3 are no strips of
width 5. What follows the layer mixes channels, so an error e at a position costs e' S e (:mod:`sensitivity`), and the
banks and biases of the active channels minimise

    J = mix * sum over positions of e' S e  +  (1 - mix) * sum over channels of S_cc J_c

with J_c of :mod:`fit`. That is one least-squares problem of all channels, too large to be written down; conjugate
gradients solve it, with the channels' own normal equations as preconditioner. They need the maps themselves: as many as
fit a budget are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sw_transplant.layers.orders import Orders
from sw_transplant.surgery.calibration.assembly import Assembly, select_orders
from sw_transplant.surgery.calibration.channels import MAPS_TOGETHER, each_part
from sw_transplant.surgery.calibration.fit import (
    Fit,
    Problem,
    centre_tap,
    error_of,
    factor_symmetric,
    solve_factored,
    whole_taps,
    without_residual,
)
from sw_transplant.surgery.calibration.moments import Taps, computed_in

_NUMBERS = 2**22
"""Of the input maps that are kept: 16 MB in float32, and some ten times that while the problem is solved."""
_STEPS, _ENOUGH = 30, 1e-3


class Kept:
    """The first maps of a layer, input and target, up to a budget; one image at least."""

    def __init__(self) -> None:
        self.maps: list[tuple[Tensor, Tensor]] = []
        self._numbers = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """One call of the layer."""
        if not x.numel():
            return
        room = max((_NUMBERS - self._numbers) // x[0].numel(), 0 if self.maps else 1)
        if room < 1:
            return
        x, y = x[:room].clone(), y[:room].clone()  # a slice would hold on to its whole batch
        self.maps.append((computed_in(x), computed_in(y)))
        self._numbers += x.numel()

    def posed(self, problem: Problem) -> list[Maps]:
        """They, as the problem of their layer needs them."""
        return [Maps(x, y, problem) for x, y in self.maps]


class Maps:
    """Responses of strips on one batch, and the transpose of that, by Fourier transforms."""

    def __init__(self, x: Tensor, y: Tensor, problem: Problem) -> None:
        self.x, self.y, self.stride = x, y, problem.taps.stride
        self.height, self.width = x.shape[2:]
        self.size = [2 * self.height, 2 * self.width]
        self.spectrum = torch.fft.rfft2(x, s=self.size)
        offsets = all_offsets(problem.taps).to(x.device)
        self.reaching = (offsets.abs() < torch.tensor(x.shape[2:], device=x.device)).all(1)
        rows, columns = (offsets[self.reaching, axis] % self.size[axis] for axis in (0, 1))
        self.places = rows * self.size[1] + columns

    def respond(self, taps: Tensor) -> Tensor:
        """``(C, P)`` to ``(B, C, H', W')``."""

        def some(part: slice) -> Tensor:
            values = taps[part, self.reaching].to(self.x)
            kernel = values.new_zeros(len(values), self.size[0] * self.size[1]).index_add_(1, self.places, values)
            spectrum = self.spectrum[:, part] * torch.fft.rfft2(kernel.view(-1, *self.size)).conj()
            whole = torch.fft.irfft2(spectrum, s=self.size)
            return whole[:, :, : self.height : self.stride[0], : self.width : self.stride[1]]

        return torch.cat(each_part(some, taps, MAPS_TOGETHER), 1)

    def passed(self) -> Tensor:
        """``(B, C, H', W')``: the map where outputs are, as ghosts pass it on."""
        return self.x[:, :, :: self.stride[0], :: self.stride[1]]

    def gather(self, errors: Tensor) -> Tensor:
        """``(B, C, H', W')`` to float64 ``(C, P)``: the sums of products with what every tap reads."""

        def some(part: slice) -> Tensor:
            spread = errors.new_zeros(self.x[:, part].shape)
            spread[:, :, :: self.stride[0], :: self.stride[1]] = errors[:, part]
            spectrum = (torch.fft.rfft2(spread, s=self.size).conj() * self.spectrum[:, part]).sum(0)
            sums = torch.fft.irfft2(spectrum, s=self.size).flatten(1)
            taps = sums.new_zeros(len(sums), len(self.reaching), dtype=torch.float64)
            taps[:, self.reaching] = sums[:, self.places].double()
            return taps

        return torch.cat(each_part(some, errors.transpose(0, 1), MAPS_TOGETHER))


def costs_together(
    problem: Problem, fit: Fit, maps: Sequence[Maps], weights: Tensor, mix: float
) -> tuple[Tensor, Tensor]:
    """What it costs that channels bypass the module, all together: for :func:`ghosts.exchange`.

    Args:
        problem, fit: of the layer, each channel at its best.
        maps: some of its maps.
        weights: S, ``(C, C)``.
        mix: how far errors of other channels count.

    Returns:
        linear ``(C,)`` and quadratic ``(C, C)``.
    """
    weights = mix * weights.to(problem.gram) + (1 - mix) * torch.diag(weights.to(problem.gram).diagonal())
    taps = whole_taps(problem, fit)
    of_both, of_changes = torch.zeros_like(weights), torch.zeros_like(weights)
    for each in maps:
        errors = each.respond(taps) + fit.bias.to(each.y)[:, None, None] - each.y
        errors = errors.transpose(0, 1).flatten(1)  # (C, positions)
        changes = (each.passed() - each.y).transpose(0, 1).flatten(1) - errors
        of_both += changes @ errors.T
        of_changes += changes @ changes.T
    return (weights * of_both).sum(1), weights * of_changes


def compensate(
    problem: Problem,
    fit: Fit,
    orders: Orders,
    maps: Sequence[Maps],
    ghosts: tuple[int, ...],
    weights: Tensor,
    mix: float,
) -> Fit:
    """The fit of all active channels together.

    Args:
        problem, fit, orders: of the layer; what each channel does best by itself.
        maps: some of its maps.
        ghosts: channels that bypass the module.
        weights: S, ``(C, C)``.
        mix: from 0, each channel for itself, to 1.

    Returns:
        The new fit; that of the ghosts means nothing.
    """
    weights = weights.to(problem.gram)
    diagonal = weights.diagonal().clamp(min=1e-6 * float(weights.diagonal().mean()))
    scale = 1 / float(diagonal.mean())
    weights, diagonal = weights * scale, diagonal * scale
    active = torch.ones_like(diagonal)
    active[list(ghosts)] = 0
    scales = fit.scales * active[:, None]
    made = Assembly(orders, problem.taps, scales)
    right, _ = without_residual(problem, fit.residual)
    own = (1 - mix) * diagonal
    normal = torch.cat(each_part(lambda some: _normal(problem, orders, scales, some), right))
    products = made.added(right[..., None])[..., 0]
    factor = factor_symmetric(normal * diagonal[:, None, None])
    share = mix * problem.moments.positions / sum(each.y[:, 0].numel() for each in maps)
    mixing = weights.to(maps[0].x)
    # Around the fit of each channel by itself the biases are free of the taps: those move the mean of the response.
    means = problem.moments.sums / problem.moments.positions

    def respond(each: Maps, bank: Tensor, bias: Tensor) -> Tensor:
        taps = made.parts(bank).sum(1)
        shift = (bias - (taps * means).sum(1)) * active
        return each.respond(taps) + shift.to(each.x)[:, None, None]

    def gather(each: Maps, errors: Tensor) -> tuple[Tensor, Tensor]:
        mixed = (mixing @ errors.flatten(2)).view_as(errors)
        total = mixed.sum((0, 2, 3)).double() * active
        taps = each.gather(mixed) - total[:, None] * means
        return made.added(taps[..., None])[..., 0], total

    def add_up(values: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return sum(v[0] for v in values) * share, sum(v[1] for v in values) * share  # type: ignore[return-value]

    def apply(bank: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        taps, total = add_up([gather(each, respond(each, bank, bias)) for each in maps])
        alone = own[:, None] * (normal @ bank[..., None])[..., 0]
        return taps + alone, total + own * problem.moments.positions * bias * active

    passes = torch.ones_like(active) if fit.residual else 1 - active
    mean_target = problem.moments.target / problem.moments.positions
    centre = centre_tap(problem.taps)
    mean_left = (mean_target - (means[:, centre] if fit.residual else 0)) * active

    def target(each: Maps) -> Tensor:
        return each.y - passes.to(each.y)[:, None, None] * each.passed()

    wanted = add_up([gather(each, target(each)) for each in maps])
    bank = fit.bank.flatten(1) * active[:, None]
    bias = mean_left.clone()
    ax = apply(bank, bias)
    left = (
        wanted[0] + own[:, None] * products - ax[0],
        wanted[1] + own * problem.moments.positions * mean_left - ax[1],
    )

    def precondition(residue: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return (
            solve_factored(factor, residue[0]) * active[:, None],
            residue[1] * active / (diagonal * problem.moments.positions),
        )

    def dot(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
        return float((a[0] * b[0]).sum() + (a[1] * b[1]).sum())

    step = precondition(left)
    size = first = dot(left, step)
    for _ in range(_STEPS):
        if not size > _ENOUGH**2 * first:
            break
        image = apply(*step)
        length = size / dot(step, image)
        bank, bias = bank + length * step[0], bias + length * step[1]
        left = (left[0] - length * image[0], left[1] - length * image[1])
        ready = precondition(left)
        previous, size = size, dot(left, ready)
        step = (ready[0] + size / previous * step[0], ready[1] + size / previous * step[1])
    parts = Assembly(orders, problem.taps).parts(bank)
    found = replace(fit, bank=bank.view_as(fit.bank), parts=parts)
    found = replace(found, bias=bias - (found.taps * means).sum(1))
    return replace(found, error=error_of(problem, found))


def _normal(problem: Problem, orders: Orders, scales: Tensor, some: slice) -> Tensor:
    """The matrix of some channels' own normal equations."""
    assembly = Assembly(select_orders(orders, some), problem.taps, scales[some])
    return assembly.normal(assembly.products(problem.gram[some]))


def all_offsets(taps: Taps) -> Tensor:
    """``(P, 2)``: ``(dy, dx)`` of all taps of the strips, whether they reach a map or not."""
    horizontal = [(dy, dx) for dy in taps.across for dx in taps.along]
    vertical = [(dy, dx) for dy in taps.along for dx in taps.across]
    return torch.tensor(horizontal + vertical, device="cpu")
