"""Exchanges of two tiles' places in one edge, tried in all channels at once and kept where they help.

With M the taps that a bank makes (:func:`fit.assembly`), an exchange of tiles t and u between places p and q makes it
M + D V': D has the taps at q less those at p, V the numbers of t less those of u. The normal equations N = M'GM become

    N + W V' + V W' + V Q V',  W = M'G D,  Q = D'G D,

n n rows of what is at hand, and by Woodbury's identity what the best bank then reaches follows from the inverse of N. A
trial takes K**2 n n products for K numbers of a bank, where solving its equations anew takes K**3 and more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sw_transplant.layers.orders import Orders
from sw_transplant.surgery.calibration.fit import Problem, assembly, factor_symmetric
from sw_transplant.surgery.calibration.moments import Taps


def swap(
    problem: Problem,
    right: Tensor,
    constant: Tensor,
    orders: Orders,
    lowest: Tensor,
    count: int,
    generator: torch.Generator,
) -> tuple[Orders, Tensor]:
    """Tries exchanges in every channel.

    Args:
        problem: of the layer, or of some of its channels.
        right, constant: of what is left to the bank (:func:`fit.without_residual`).
        orders: to begin with.
        lowest: ``(C,)``: the objective that they reach.
        count: how many exchanges are tried in each channel.
        generator: on the CPU; draws them.

    Returns:
        Orders and objective that were found.
    """
    horizontal, vertical, identity = orders
    strips = torch.stack([horizontal, vertical])  # (2, E, C, T): the place of each tile
    lowest = lowest.clone()
    edges, channels, tiles = horizontal.shape
    device = strips.device
    every = torch.arange(channels, device=device)
    equations = _Equations(problem, right, assembly(orders, problem.taps).sum(1))
    for _ in range(count):
        branch = (torch.rand(channels, generator=generator) >= 0.5).long().to(device)
        edge = torch.randint(edges, (channels,), generator=generator).to(device)
        pair = torch.rand(channels, tiles, generator=generator).topk(2, 1).indices.to(device)  # two different tiles
        places = strips[branch[:, None], edge[:, None], every[:, None], pair]
        moved, onto = _taps_at(branch, places, problem.taps).unbind(1)
        trial = _Trial(*_numbers(pair, problem.taps.tile).unbind(1), moved, onto)
        promising = (constant - equations.reached_by(trial) < lowest).nonzero().flatten()
        solved = equations.solved_after(trial.select(promising), promising)
        value = constant[promising] - solved.reached()
        better = value < lowest[promising]
        kept = promising[better]
        lowest[kept] = value[better]
        equations.keep(trial.select(kept), kept, solved.select(better))
        strips[branch[kept, None], edge[kept, None], kept[:, None], pair[kept]] = places[kept].flip(1)
    return Orders(strips[0], strips[1], identity), lowest


class _Trial(NamedTuple):
    """One exchange in each channel, everything ``(C, n n)``.

    Attributes:
        first, second: the numbers of the bank that belong to the two tiles.
        moved, onto: the taps that the first tile makes before and after; those of the second the other way round.
    """

    first: Tensor
    second: Tensor
    moved: Tensor
    onto: Tensor

    def select(self, channels: Tensor) -> _Trial:
        """That of some channels."""
        return _Trial(*(each[channels] for each in self))


class _Solved(NamedTuple):
    """Normal equations for K numbers of a bank, and their solution.

    Attributes:
        normal, inverse: ``(C, K, K)``: N, and its inverse.
        wanted, bank: ``(C, K)``: M'r, and the solution.
    """

    normal: Tensor
    inverse: Tensor
    wanted: Tensor
    bank: Tensor

    @classmethod
    def of(cls, normal: Tensor, wanted: Tensor) -> _Solved:
        """Solves them."""
        inverse = torch.cholesky_inverse(factor_symmetric(normal))
        return cls(normal, inverse, wanted, (inverse @ wanted[..., None])[..., 0])

    def select(self, channels: Tensor) -> _Solved:
        """Those of some channels."""
        return _Solved(*(each[channels] for each in self))

    def reached(self) -> Tensor:
        """``(C,)``: by how much J lies below that of no taps."""
        return (self.wanted * self.bank).sum(1)


class _Equations:
    """Those of all channels for the orders that they have.

    Attributes:
        gram, right: of the problem, G ``(C, P, P)`` and r ``(C, P)``.
        product: ``(C, P, K)``: G M.
        solved: the normal equations.
    """

    def __init__(self, problem: Problem, right: Tensor, made: Tensor) -> None:
        """made: M, the taps ``(C, P, K)`` that banks make."""
        self.gram, self.right, self.product = problem.gram, right, problem.gram @ made
        self.solved = _Solved.of(made.mT @ self.product, (made.mT @ right[..., None])[..., 0])

    def reached_by(self, trial: _Trial) -> Tensor:
        """``(C,)``: by how much J lies below that of no taps after an exchange; NaN where that cannot be told."""
        _, inverse, _, bank = self.solved
        every = torch.arange(len(bank), device=bank.device)
        w = _rows(self.product, every, trial.onto, trial.moved)  # W', (C, n n, K)
        along = w @ inverse
        ww, wv = along @ w.mT, _columns(along, trial)
        vv = _columns(_rows(inverse, every, trial.first, trial.second), trial)
        one = torch.eye(w.shape[1], dtype=w.dtype, device=w.device).expand_as(ww)
        middle = torch.cat(
            [torch.cat([ww - self._quadratic(every, trial), wv + one], 2), torch.cat([wv.mT + one, vv], 2)], 1
        )
        more = self._more(every, trial)[..., None]  # M'r becomes M'r + V more
        of_bank = (bank.gather(1, trial.first) - bank.gather(1, trial.second))[..., None]
        seen = torch.cat([w @ bank[..., None] + wv @ more, of_bank + vv @ more], 1)
        less = seen * torch.linalg.solve_ex(middle, seen).result
        return self.solved.reached() + (more * (2 * of_bank + vv @ more)).sum((1, 2)) - less.sum((1, 2))

    def solved_after(self, trial: _Trial, channels: Tensor) -> _Solved:
        """The equations of some channels after their exchange, solved anew."""
        w = _rows(self.product, channels, trial.onto, trial.moved)
        one = torch.ones_like(trial.first, dtype=w.dtype)[..., None]
        v = torch.zeros_like(w)  # V'
        v.scatter_(2, trial.first[..., None], one).scatter_(2, trial.second[..., None], -one)
        half = v.mT @ (w + self._quadratic(channels, trial) @ v / 2)
        wanted = self.solved.wanted[channels] + (v * self._more(channels, trial)[..., None]).sum(1)
        return _Solved.of(self.solved.normal[channels] + half + half.mT, wanted)

    def keep(self, trial: _Trial, channels: Tensor, solved: _Solved) -> None:
        """Carries out the exchange of some channels."""
        for mine, new in zip(self.solved, solved, strict=True):
            mine[channels] = new
        change = _rows(self.gram, channels, trial.onto, trial.moved).mT  # G D
        where = channels[:, None, None], torch.arange(change.shape[1], device=change.device)[:, None]
        self.product[(*where, trial.first[:, None])] += change
        self.product[(*where, trial.second[:, None])] -= change

    def _quadratic(self, channels: Tensor, trial: _Trial) -> Tensor:
        """Q ``(C, n n, n n)``."""
        both = torch.cat([trial.onto, trial.moved], 1)
        block = self.gram[channels[:, None, None], both[:, :, None], both[:, None]]
        size = trial.onto.shape[1]
        half = block[:, :size] - block[:, size:]
        return half[:, :, :size] - half[:, :, size:]

    def _more(self, channels: Tensor, trial: _Trial) -> Tensor:
        """D'r ``(C, n n)``."""
        return _rows(self.right, channels, trial.onto, trial.moved)


def _rows(matrices: Tensor, channels: Tensor, plus: Tensor, minus: Tensor) -> Tensor:
    """``(C, n n, ...)``: some rows of some channels' matrices less others."""
    return matrices[channels[:, None], plus] - matrices[channels[:, None], minus]


def _columns(lines: Tensor, trial: _Trial) -> Tensor:
    """``(C, n n, K)`` times V: ``(C, n n, n n)``."""
    first, second = (each[:, None].expand(-1, lines.shape[1], -1) for each in (trial.first, trial.second))
    return lines.gather(2, first) - lines.gather(2, second)


def _numbers(pair: Tensor, n: int) -> Tensor:
    """``(C, 2)`` tiles to the numbers of the bank that are theirs, ``(C, 2, n n)``."""
    return pair[..., None] * n * n + torch.arange(n * n, device=pair.device)


def _taps_at(branch: Tensor, places: Tensor, taps: Taps) -> Tensor:
    """``(C,)``, ``(C, 2)`` to the taps that a tile makes at a place, ``(C, 2, n n)``, in the order of its numbers."""
    n, whole = taps.tile, taps.whole
    steps = torch.arange(n, device=places.device)
    along = (steps[:, None] * whole + steps).flatten() + places[..., None] * n
    down = n * whole + places[..., None] * n * n + torch.arange(n * n, device=places.device)
    return torch.where(branch[:, None, None] == 0, along, down)
