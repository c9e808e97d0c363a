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
from sw_transplant.surgery.calibration.fit import Problem, assembly, factor_symmetric, objective_of
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
    edges, channels, tiles = horizontal.shape
    device, reached = strips.device, lowest.clone()
    every = torch.arange(channels, device=device)
    equations = _Equations(problem, right, assembly(orders, problem.taps).sum(1))
    for _ in range(count):
        branch = (torch.rand(channels, generator=generator) >= 0.5).long().to(device)
        edge = torch.randint(edges, (channels,), generator=generator).to(device)
        pair = torch.rand(channels, tiles, generator=generator).topk(2, 1).indices.to(device)  # two different tiles
        places = strips[branch[:, None], edge[:, None], every[:, None], pair]
        first, second = _numbers(pair, problem.taps.tile).unbind(1)
        moved, onto = _taps_at(branch, places, problem.taps).unbind(1)
        trial = equations.tried(_Exchange(first, second, moved, onto))
        value = constant - trial.reached
        better = (value < reached).nonzero().flatten()
        reached[better] = value[better]
        equations.keep(trial, better)
        strips[branch[better, None], edge[better, None], better[:, None], pair[better]] = places[better].flip(1)
    # Solved anew: where equations are nearly singular, what was added up is not to be trusted.
    found = Orders(strips[0], strips[1], identity)
    reached = objective_of(problem, found, right, constant)
    worse = ~(reached < lowest)
    strips[:, :, worse] = torch.stack([horizontal, vertical])[:, :, worse]
    return found, torch.where(worse, lowest, reached)


class _Exchange(NamedTuple):
    """One in each channel, everything ``(C, n n)``.

    Attributes:
        first, second: the numbers of the bank that belong to the two tiles.
        moved, onto: the taps that the first tile makes before and after; those of the second the other way round.
    """

    first: Tensor
    second: Tensor
    moved: Tensor
    onto: Tensor

    def select(self, channels: Tensor) -> _Exchange:
        """That of some channels."""
        return _Exchange(*(each[channels] for each in self))


class _Trial(NamedTuple):
    """What an exchange would make of the equations.

    Attributes:
        exchange: the exchange.
        reached: ``(C,)``: by how much J would lie below that of no taps; NaN where that cannot be told.
        sides: ``(C, 2 n n, K)``: [W, V]' times the inverse of N.
        middle: ``(C, 2 n n, 2 n n)``: what the inverse loses is sides' times the inverse of this times sides.
        more: ``(C, n n)``: M'r becomes M'r + V more.
    """

    exchange: _Exchange
    reached: Tensor
    sides: Tensor
    middle: Tensor
    more: Tensor


class _Equations:
    """Those of all channels for the orders that they have, and their solution.

    Attributes:
        gram, right: of the problem, G ``(C, P, P)`` and r ``(C, P)``.
        product: ``(C, P, K)``: G M.
        inverse: ``(C, K, K)``: of N.
        wanted, bank: ``(C, K)``: M'r, and the solution.
    """

    def __init__(self, problem: Problem, right: Tensor, made: Tensor) -> None:
        """made: M, the taps ``(C, P, K)`` that banks make."""
        self.gram, self.right, self.product = problem.gram, right, problem.gram @ made
        self.inverse = torch.cholesky_inverse(factor_symmetric(made.mT @ self.product))
        self.wanted = (made.mT @ right[..., None])[..., 0]
        self.bank = (self.inverse @ self.wanted[..., None])[..., 0]

    def tried(self, exchange: _Exchange) -> _Trial:
        """An exchange in every channel, as it would be."""
        every = torch.arange(len(self.bank), device=self.bank.device)
        w = _rows(self.product, every, exchange.onto, exchange.moved)  # W', (C, n n, K)
        along, across = w @ self.inverse, _rows(self.inverse, every, exchange.first, exchange.second)
        ww, wv, vv = along @ w.mT, _columns(along, exchange), _columns(across, exchange)
        one = torch.eye(w.shape[1], dtype=w.dtype, device=w.device).expand_as(ww)
        above = torch.cat([ww - self._quadratic(exchange), wv + one], 2)
        middle = torch.cat([above, torch.cat([wv.mT + one, vv], 2)], 1)
        more = _rows(self.right, every, exchange.onto, exchange.moved)[..., None]
        of_bank = (self.bank.gather(1, exchange.first) - self.bank.gather(1, exchange.second))[..., None]
        seen = torch.cat([w @ self.bank[..., None] + wv @ more, of_bank + vv @ more], 1)
        less = (seen * torch.linalg.solve_ex(middle, seen).result).sum((1, 2))
        reached = (self.wanted * self.bank).sum(1) + (more * (2 * of_bank + vv @ more)).sum((1, 2)) - less
        return _Trial(exchange, reached, torch.cat([along, across], 1), middle, more[..., 0])

    def keep(self, trial: _Trial, channels: Tensor) -> None:
        """Carries out the exchange of some channels."""
        exchange, sides, more = trial.exchange.select(channels), trial.sides[channels], trial.more[channels]
        self.inverse[channels] -= sides.mT @ torch.linalg.solve_ex(trial.middle[channels], sides).result
        self.wanted[channels] = (
            self.wanted[channels].scatter_add(1, exchange.first, more).scatter_add(1, exchange.second, -more)
        )
        self.bank[channels] = (self.inverse[channels] @ self.wanted[channels][..., None])[..., 0]
        change = _rows(self.gram, channels, exchange.onto, exchange.moved).mT  # G D
        rows = torch.arange(change.shape[1], device=change.device)[:, None]
        for numbers, part in ((exchange.first, change), (exchange.second, -change)):
            self.product.index_put_((channels[:, None, None], rows, numbers[:, None]), part, accumulate=True)

    def _quadratic(self, exchange: _Exchange) -> Tensor:
        """Q ``(C, n n, n n)``."""
        both = torch.cat([exchange.onto, exchange.moved], 1)
        every = torch.arange(len(both), device=both.device)
        block = self.gram[every[:, None, None], both[:, :, None], both[:, None]]
        size = exchange.onto.shape[1]
        half = block[:, :size] - block[:, size:]
        return half[:, :, :size] - half[:, :, size:]


def _rows(matrices: Tensor, channels: Tensor, plus: Tensor, minus: Tensor) -> Tensor:
    """``(C, n n, ...)``: some rows of some channels' matrices less others."""
    return matrices[channels[:, None], plus] - matrices[channels[:, None], minus]


def _columns(lines: Tensor, exchange: _Exchange) -> Tensor:
    """``(C, n n, K)`` times V: ``(C, n n, n n)``."""
    first, second = (each[:, None].expand(-1, lines.shape[1], -1) for each in (exchange.first, exchange.second))
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
