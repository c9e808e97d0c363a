"""Least squares in closed form: the bank of the paper's module whose responses come closest to the targets.

Per channel, with b the bank (T n n numbers), A the taps that it makes for given orders, k0 the tap of the residual,
G and r the centred moments of the calibration images and k the original kernel, what is minimised is

    J(b) = |responses - targets|**2 + ridge * (taps - k)**2 = b' A' G A b - 2 b' A' (r - G k0) + ...

with the ridge in G and r already: as if white noise of that variance lay on every map. Where the images say nothing, as
of taps that no output of this map reads, the kernel decides; with an endless ridge J is least squares in kernel space.
The bias is what the means leave over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sw_transplant.layers.orders import Orders
from sw_transplant.surgery.calibration.assembly import Assembly, select_orders
from sw_transplant.surgery.calibration.channels import each_part
from sw_transplant.surgery.calibration.moments import Moments, Taps

_SMALLEST = 1e-10
"""Added to the diagonal of normal equations, relative to its mean: banks that two orders make alike have no solution
else."""


@dataclass(frozen=True)
class Problem:
    """The normal equations of a layer over all taps of its strips (``P``: the horizontal one row by row, the vertical).

    Attributes:
        gram: float64 ``(C, P, P)``, centred, with the ridge.
        right: ``(C, P)``, the same.
        constant: ``(C,)``: J of no taps at all.
        ridge: ``(C,)``, of a squared tap.
        kernel: ``(C, P)``: the original's tap at the place of each tap.
        kernel_energy: ``(C,)``: of all taps of the original, those beyond the strips, too.
        taps, moments: what it is made of.
    """

    gram: Tensor
    right: Tensor
    constant: Tensor
    ridge: Tensor
    kernel: Tensor
    kernel_energy: Tensor
    taps: Taps
    moments: Moments

    @property
    def energy(self) -> Tensor:
        """``(C,)``: sum of squared deviations of the targets from their mean."""
        return self.moments.target_squared - self.moments.target.square() / self.moments.positions

    def select(self, channels: Tensor | slice) -> Problem:
        """That of some channels."""
        tensors = {name: value[channels] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Problem(**tensors, taps=self.taps, moments=self.moments.select(channels))


@dataclass(frozen=True)
class Fit:
    """A solution.

    Attributes:
        bank: float64 ``(C, T, n, n)``.
        scales: ``(C, 3)``, what multiplies each branch.
        bias: ``(C,)``.
        objective: ``(C,)``: J.
        error: ``(C,)``: the sum of squared errors of the responses on the calibration images.
        parts: ``(C, 3, P)``: the taps of each branch, without its scale.
        residual: whether the input is added.
    """

    bank: Tensor
    scales: Tensor
    bias: Tensor
    objective: Tensor
    error: Tensor
    parts: Tensor
    residual: bool

    @property
    def taps(self) -> Tensor:
        """``(C, P)``: those of all branches, with their scales, without the residual."""
        return (self.parts * self.scales[..., None]).sum(1)


def pose(moments: Moments, taps: Taps, kernel: Tensor, kernel_energy: Tensor, ridge: float) -> Problem:
    """The problem of a layer.

    Args:
        moments: of its calibration images, over all taps (:meth:`Moments.spread`).
        taps: of its strips.
        kernel: ``(C, P)``, the original's taps at the places of the strips' taps.
        kernel_energy: ``(C,)``.
        ridge: relative to the mean square of the input.
    """
    count, twins = moments.positions, taps.twins.to(moments.gram.device)
    gram, weight = torch.empty_like(moments.gram), torch.empty_like(kernel_energy)

    def pose_some(some: slice) -> None:
        sums = moments.sums[some]
        whole = torch.baddbmm(moments.gram[some], sums[:, :, None], sums[:, None], alpha=-1 / count, out=gram[some])
        diagonal = whole.diagonal(dim1=1, dim2=2)
        read = (moments.gram[some].diagonal(dim1=1, dim2=2) > 0).sum(1).clamp(min=1)
        scale = diagonal.sum(1) / read
        weight[some] = torch.where(scale > 0, ridge * scale, 1.0)
        diagonal.add_(weight[some, None])
        whole[:, twins[:, 0], twins[:, 1]] += weight[some, None]
        whole[:, twins[:, 1], twins[:, 0]] += weight[some, None]

    each_part(pose_some, gram)
    right = moments.right - moments.sums * moments.target[:, None] / count + weight[:, None] * kernel
    constant = moments.target_squared - moments.target.square() / count + weight * kernel_energy
    return Problem(gram, right, constant, weight, kernel, kernel_energy, taps, moments)


def fit_layer(problem: Problem, orders: Orders, residual: bool, rounds: int = 4) -> Fit:
    """The best bank and scales of the branches for given orders: in turn, each in closed form.

    Args:
        problem: of the layer.
        orders: of its channels.
        residual: whether the module adds its input.
        rounds: how often scales and bank take turns; 0 leaves all scales at 1.
    """
    parts = each_part(
        lambda some: _fit_some(problem.select(some), select_orders(orders, some), residual, rounds), problem.right
    )
    tensors = {name: [getattr(part, name) for part in parts] for name in vars(parts[0]) if name != "residual"}
    return Fit(**{name: torch.cat(values) for name, values in tensors.items()}, residual=residual)


def _fit_some(problem: Problem, orders: Orders, residual: bool, rounds: int) -> Fit:
    assembly = Assembly(orders, problem.taps)
    right, constant = without_residual(problem, residual)
    channels = len(right)
    normal = assembly.by_branch(problem.gram)  # (C, 3, 3, K, K)
    wanted = assembly.gather(right[..., None])[..., 0]  # (C, 3, K)

    def best_bank(scales: Tensor) -> Tensor:
        pairs = (scales[:, :, None] * scales[:, None]).view(channels, 1, 9)
        scaled = (pairs @ normal.view(channels, 9, -1)).view(normal[:, 0, 0].shape)
        return solve_symmetric(scaled, (scales[:, None] @ wanted)[:, 0])

    def of_scales(bank: Tensor) -> tuple[Tensor, Tensor]:
        """The normal equations of the scales for a bank: ``(C, 3, 3)``, ``(C, 3)``."""
        images = (normal.flatten(1, 3) @ bank[..., None]).view(channels, 9, -1)
        return (images @ bank[..., None]).view(channels, 3, 3), (wanted @ bank[..., None])[..., 0]

    def reached(squares: Tensor, products: Tensor, scales: Tensor) -> Tensor:
        return constant + (scales * ((squares @ scales[..., None])[..., 0] - 2 * products)).sum(1)

    scales = right.new_ones(channels, 3)
    bank = best_bank(scales)
    equations = of_scales(bank)
    objective = reached(*equations, scales)
    for _ in range(rounds):
        rescaled = solve_symmetric(*equations)
        rescaled = torch.where((reached(*equations, rescaled) < objective)[:, None], rescaled, scales)
        better = best_bank(rescaled)
        equations = of_scales(better)
        value = reached(*equations, rescaled)
        if not bool((value < objective * (1 - 1e-4)).any()):
            break
        bank, scales, objective = better, rescaled, value
    return _fit(problem, bank, assembly.parts(bank), scales, residual)


def objectives(problem: Problem, orders: Orders) -> Tensor:
    """``(C, 2)``: J of the best banks for given orders, branches unscaled; without the residual, and with it."""

    def of_some(some: slice) -> Tensor:
        posed, assembly = problem.select(some), Assembly(select_orders(orders, some), problem.taps)
        sides = [without_residual(posed, residual) for residual in (False, True)]
        wanted = assembly.added(torch.stack([right for right, _ in sides], 2))  # (C, K, 2)
        factor = factor_symmetric(assembly.normal(assembly.products(posed.gram)))
        gained = (torch.cholesky_solve(wanted, factor) * wanted).sum(1)
        return torch.stack([constant for _, constant in sides], 1) - gained

    return torch.cat(each_part(of_some, problem.right))


def without_residual(problem: Problem, residual: bool) -> tuple[Tensor, Tensor]:
    """Right sides ``(C, P)`` and constant ``(C,)`` of what is left to the bank where the module adds its input."""
    if not residual:
        return problem.right, problem.constant
    centre = centre_tap(problem.taps)
    right = problem.right - problem.gram[:, :, centre]
    return right, problem.constant - 2 * problem.right[:, centre] + problem.gram[:, centre, centre]


def centre_tap(taps: Taps) -> int:
    """Where the tap (0, 0) is in the horizontal strip."""
    return -taps.across.start * taps.whole - taps.along.start


def least_possible(problem: Problem) -> Tensor:
    """``(C,)``: J of strips whose taps are all free; no bank and no orders come below it."""
    free = each_part(lambda some: solve_symmetric(problem.gram[some], problem.right[some]), problem.right)
    return problem.constant - (torch.cat(free) * problem.right).sum(1)


def solve_symmetric(normal: Tensor, right: Tensor) -> Tensor:
    """``(C, K, K)`` positive semidefinite, ``(C, K)``: the solution, kept small where there are many."""
    return solve_factored(factor_symmetric(normal), right)


def factor_symmetric(normal: Tensor) -> Tensor:
    """Cholesky factors ``(C, K, K)`` of matrices that may be singular: with as little on the diagonal as is needed."""
    jitter = _SMALLEST * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    jitter = torch.where(jitter > 0, jitter, 1.0)
    for _ in range(6):
        shifted = normal.clone()
        shifted.diagonal(dim1=1, dim2=2).add_(jitter)
        factor, failed = torch.linalg.cholesky_ex(shifted.mT)  # the same matrix, as LAPACK wants it in memory
        if not bool(failed.any()):
            break
        jitter = torch.where(failed[:, None] != 0, 100 * jitter, jitter)
    return factor


def solve_factored(factor: Tensor, right: Tensor) -> Tensor:
    """``(C, K, K)`` of :func:`factor_symmetric`, ``(C, K)``."""
    return torch.cholesky_solve(right[..., None], factor)[..., 0]


def whole_taps(problem: Problem, fit: Fit) -> Tensor:
    """``(C, P)``: the taps of a fit and of its residual."""
    return _with_residual(problem, fit.taps, fit.residual)


def _with_residual(problem: Problem, taps: Tensor, residual: bool) -> Tensor:
    whole = taps.clone()
    if residual:
        whole[:, centre_tap(problem.taps)] += 1
    return whole


def error_of(problem: Problem, fit: Fit) -> Tensor:
    """``(C,)``: the sum of squared errors of a fit's responses on the calibration images, its bias as it is."""
    whole, moments = whole_taps(problem, fit), problem.moments
    squares = (whole * (moments.gram @ whole[..., None])[..., 0]).sum(1)
    means = (whole * moments.sums).sum(1)
    cross = (whole * moments.right).sum(1)
    error = squares + moments.target_squared + moments.positions * fit.bias.square()
    return (error - 2 * cross + 2 * fit.bias * (means - moments.target)).clamp(min=0)


def _fit(problem: Problem, bank: Tensor, parts: Tensor, scales: Tensor, residual: bool) -> Fit:
    tile = problem.taps.tile
    taps = (parts * scales[..., None]).sum(1)
    right, constant = without_residual(problem, residual)
    objective = constant - 2 * (taps * right).sum(1) + (taps * (problem.gram @ taps[..., None])[..., 0]).sum(1)
    whole = _with_residual(problem, taps, residual)
    error = (objective - problem.ridge * kernel_distance(problem, whole)).clamp(min=0)
    moments = problem.moments
    bias = (moments.target - (moments.sums * whole).sum(1)) / moments.positions
    bank = bank.view(len(bank), -1, tile, tile)
    return Fit(bank, scales, bias, objective.clamp(min=0), error, parts, residual)


def kernel_distance(problem: Problem, taps: Tensor) -> Tensor:
    """``(C,)``: squared distance of the kernel that the strips' taps add up to from the original one."""
    twins = problem.taps.twins.to(taps.device)
    both = taps.square().sum(1) + 2 * (taps[:, twins[:, 0]] * taps[:, twins[:, 1]]).sum(1)
    return (problem.kernel_energy - 2 * (taps * problem.kernel).sum(1) + both).clamp(min=0)
