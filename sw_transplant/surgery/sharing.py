"""Least-squares sharing: the bank whose placements come closest to given kernels.

The kernel that a bank makes is linear in the bank: tiles are copied to their places and added up (and multiplied with
gains and BatchNorm scales). Where one bank serves several branches and edges, as in the paper's module, it cannot make
every kernel; the best it can do is a linear least-squares problem per channel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LARGEST_PROBLEM = 2**25
"""Numbers in the stacked matrices of one solve (256 MB in float64): channels are solved in groups of this size."""

_SMALLEST_PIVOT = 1e-4
"""Of a Cholesky factor, relative to the largest: below it the normal equations have lost half of float64's digits."""


def share(target: Tensor, assemble: Callable[[Tensor], Tensor], tiles: int, tile: int) -> tuple[Tensor, Tensor]:
    """The bank that brings an assembly closest to the target kernels, per channel, in the sense of least squares.

    Args:
        target: ``(C, 1, kh, kw)``, the kernels to come close to.
        assemble: linear map from banks ``(C, T, n, n)`` in float64 to kernels of the target's shape; every channel of
            the kernel depends on the same channel of the bank only.
        tiles: T.
        tile: n.

    Returns:
        bank: ``(C, T, n, n)``, dtype and device of the target; the smallest one where several are equally good.
        kept: float64 ``(C,)``, the share of the target's energy (sum of squared taps) that its approximation keeps:
            1 - |assembled - target|**2 / |target|**2; 1 where the target is zero.

    Raises:
        ValueError: ``assemble`` gives kernels of another shape than the target's.
    """
    channels, taps = target.shape[0], tiles * tile * tile
    wanted = target.detach().cpu().double().flatten(1)  # (C, kh * kw)
    basis = torch.zeros(channels, tiles, tile, tile, dtype=torch.float64, device="cpu")
    reached = _flat(assemble(basis + 1), target).any(0)  # places of the kernel that some tap comes to lie on
    columns = []
    for j in range(taps):
        basis.view(channels, taps)[:, j] = 1
        columns.append(_flat(assemble(basis), target)[:, reached])
        basis.zero_()
    matrix = torch.stack(columns, dim=2)  # (C, places, T * n * n)
    right = wanted[:, reached, None]
    step = max(1, _LARGEST_PROBLEM // max(1, matrix[0].numel()))
    bank = torch.cat([_solve(m, r) for m, r in zip(matrix.split(step), right.split(step), strict=True)])
    missed = (matrix @ bank - right).square().sum((1, 2)) + wanted[:, ~reached].square().sum(1)
    energy = wanted.square().sum(1)
    kept = torch.where(energy > 0, 1 - missed / energy.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
    return bank.reshape(channels, tiles, tile, tile).to(target), kept


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Least squares for a batch of matrices: by Cholesky factors, and by SVD where these find a rank deficiency."""
    transposed = matrix.mT
    factor, failed = torch.linalg.cholesky_ex(transposed @ matrix)
    pivots = factor.diagonal(dim1=1, dim2=2)
    deficient = (failed != 0) | (pivots.amin(1) < _SMALLEST_PIVOT * pivots.amax(1))
    solution = torch.cholesky_solve(transposed @ right, factor)
    # One step of refinement regains what squaring the condition number has cost.
    solution += torch.cholesky_solve(transposed @ (right - matrix @ solution), factor)
    if bool(deficient.any()):
        solution[deficient] = torch.linalg.lstsq(matrix[deficient], right[deficient], driver="gelsd").solution
    return solution


def _flat(kernel: Tensor, target: Tensor) -> Tensor:
    if kernel.shape != target.shape:
        raise ValueError(f"share: assemble gave {tuple(kernel.shape)}, expected the target's {tuple(target.shape)}")
    return kernel.detach().cpu().double().flatten(1)
