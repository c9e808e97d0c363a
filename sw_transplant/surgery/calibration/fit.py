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

    def select(self, channels: Tensor) -> Problem:
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
    count = moments.positions
    gram = moments.gram - moments.sums[:, :, None] * moments.sums[:, None] / count
    right = moments.right - moments.sums * moments.target[:, None] / count
    diagonal = gram.diagonal(dim1=1, dim2=2)
    scale = diagonal.sum(1) / (moments.gram.diagonal(dim1=1, dim2=2) > 0).sum(1).clamp(min=1)
    weight = torch.where(scale > 0, ridge * scale, 1.0)
    twins = _twins(taps).to(gram.device)
    diagonal.add_(weight[:, None])
    gram[:, twins[:, 0], twins[:, 1]] += weight[:, None]
    gram[:, twins[:, 1], twins[:, 0]] += weight[:, None]
    right = right + weight[:, None] * kernel
    constant = moments.target_squared - moments.target.square() / count + weight * kernel_energy
    return Problem(gram, right, constant, weight, kernel, kernel_energy, taps, moments)


def assembly(orders: Orders, taps: Taps) -> Tensor:
    """The taps that each number of a bank makes: float64 ``(C, 3, P, T n n)``, by branch; on the orders' device."""
    horizontal, vertical, identity = (order.long() for order in orders)
    _, channels, tiles = horizontal.shape
    n, whole = taps.tile, taps.whole
    place = torch.eye(tiles, dtype=torch.float64, device=horizontal.device)
    along, down = place[horizontal].sum(0), place[vertical].sum(0)  # (C, tile, place): how many edges put it there
    taken = place[identity].sum(0)  # (C, tile)
    one = torch.eye(n, dtype=torch.float64, device=horizontal.device)
    shape = (channels, n * whole, tiles * n * n)
    rows = torch.einsum("ctp,ia,jb->cipjtab", along, one, one).reshape(shape)
    columns = torch.einsum("ctp,ia,jb->cpijtab", down, one, one).reshape(shape)
    small = torch.einsum("ct,ia,jb->cijtab", taken, one, one).reshape(channels, n * n, -1)
    matrix = rows.new_zeros(channels, 3, 2 * n * whole, tiles * n * n)
    matrix[:, 0, : n * whole] = rows
    matrix[:, 1, n * whole :] = columns
    matrix[:, 2, _twins(taps)[:, 0].to(rows.device)] = small
    return matrix


def solve(problem: Problem, matrix: Tensor, scales: Tensor, residual: bool) -> Fit:
    """The best bank for given orders and scales.

    Args:
        problem: of the layer.
        matrix: of :func:`assembly`.
        scales: ``(C, 3)``.
        residual: whether the module adds its input.
    """
    made = torch.einsum("ckpb,ck->cpb", matrix, scales)
    right, _ = without_residual(problem, residual)
    normal = made.mT @ (problem.gram @ made)
    bank = solve_symmetric(normal, (made.mT @ right[..., None])[..., 0])
    parts = torch.einsum("ckpb,cb->ckp", matrix, bank)
    return _fit(problem, bank.view(len(bank), -1, problem.taps.tile, problem.taps.tile), parts, scales, residual)


def rescale(problem: Problem, fit: Fit) -> Fit:
    """The best scales of the branches for the bank of a fit."""
    right, _ = without_residual(problem, fit.residual)
    normal = fit.parts @ (problem.gram @ fit.parts.mT)
    scales = solve_symmetric(normal, (fit.parts @ right[..., None])[..., 0])
    better = _fit(problem, fit.bank, fit.parts, scales, fit.residual)
    worse = ~(better.objective < fit.objective)
    return _fit(problem, fit.bank, fit.parts, torch.where(worse[:, None], fit.scales, scales), fit.residual)


def fit_layer(problem: Problem, orders: Orders, residual: bool, rounds: int = 4) -> Fit:
    """The best bank and scales for given orders: in turn, each in closed form."""
    matrix = assembly(Orders(*(order.to(problem.gram.device) for order in orders)), problem.taps)
    ones = problem.right.new_ones(len(problem.right), 3)
    fit = solve(problem, matrix, ones, residual)
    for _ in range(rounds):
        scales = rescale(problem, fit).scales
        better = solve(problem, matrix, scales, residual)
        if not bool((better.objective < fit.objective * (1 - 1e-4)).any()):
            break
        fit = better
    return fit


def objective_of(problem: Problem, orders: Orders, right: Tensor, constant: Tensor) -> Tensor:
    """``(C,)``: J of the best banks for given orders, branches unscaled; the rest as of :func:`without_residual`."""
    made = assembly(orders, problem.taps).sum(1)  # (C, P, K)
    wanted = (made.mT @ right[..., None])[..., 0]
    return constant - (solve_symmetric(made.mT @ (problem.gram @ made), wanted) * wanted).sum(1)


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
    free = solve_symmetric(problem.gram, problem.right)
    return problem.constant - (free * problem.right).sum(1)


def solve_symmetric(normal: Tensor, right: Tensor) -> Tensor:
    """``(C, K, K)`` positive semidefinite, ``(C, K)``: the solution, kept small where there are many."""
    return solve_factored(factor_symmetric(normal), right)


def factor_symmetric(normal: Tensor) -> Tensor:
    """Cholesky factors ``(C, K, K)`` of matrices that may be singular: with as little on the diagonal as is needed."""
    diagonal = normal.diagonal(dim1=1, dim2=2)
    jitter = _SMALLEST * diagonal.mean(1, keepdim=True)
    jitter = torch.where(jitter > 0, jitter, 1.0)
    for _ in range(6):
        factor, failed = torch.linalg.cholesky_ex(normal + torch.diag_embed(jitter.expand_as(diagonal)))
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
    taps = (parts * scales[..., None]).sum(1)
    right, constant = without_residual(problem, residual)
    objective = constant - 2 * (taps * right).sum(1) + (taps * (problem.gram @ taps[..., None])[..., 0]).sum(1)
    whole = _with_residual(problem, taps, residual)
    error = (objective - problem.ridge * kernel_distance(problem, whole)).clamp(min=0)
    moments = problem.moments
    bias = (moments.target - (moments.sums * whole).sum(1)) / moments.positions
    return Fit(bank, scales, bias, objective.clamp(min=0), error, parts, residual)


def kernel_distance(problem: Problem, taps: Tensor) -> Tensor:
    """``(C,)``: squared distance of the kernel that the strips' taps add up to from the original one."""
    twins = _twins(problem.taps).to(taps.device)
    both = taps.square().sum(1) + 2 * (taps[:, twins[:, 0]] * taps[:, twins[:, 1]]).sum(1)
    return (problem.kernel_energy - 2 * (taps * problem.kernel).sum(1) + both).clamp(min=0)


def _twins(taps: Taps) -> Tensor:
    """``(n * n, 2)``: taps of the two strips that lie in the same place, around the centre."""
    n, whole, first = taps.tile, taps.whole, taps.across.start - taps.along.start
    steps = torch.arange(n, device="cpu")
    horizontal = steps[:, None] * whole + first + steps
    vertical = n * whole + (first + steps)[:, None] * n + steps
    return torch.stack([horizontal.flatten(), vertical.flatten()], 1)
