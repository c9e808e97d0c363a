"""Exchanges of two tiles' places in one edge, tried in many channels at once and kept where they help.

With M the taps that a bank makes (:mod:`assembly`), an exchange of tiles t and u between places p and q makes it
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
from sw_transplant.surgery.calibration.assembly import Assembly, select_orders
from sw_transplant.surgery.calibration.channels import each_part
from sw_transplant.surgery.calibration.fit import Problem, factor_symmetric, without_residual
from sw_transplant.surgery.calibration.moments import Taps

_TOGETHER = 64
"""Channels that try exchanges together: a trial is many small operations."""


def swap(
    problem: Problem, orders: Orders, residual: bool, channels: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Tries exchanges in some channels.

    Args:
        problem: of the layer.
        orders: to begin with; changed in place.
        residual: whether the module adds its input.
        channels: ``(D,)``, in which.
        count: how many exchanges are tried in each.
        generator: on the CPU; draws them.

    Returns:
        The objective that was found, ``(D,)``; added up over exchanges: not to be trusted where equations are nearly
        singular.
    """
    edges, _, tiles = orders.horizontal.shape
    draws = [_Draw.of(len(channels), tiles, edges, generator, channels.device) for _ in range(count)]

    def try_some(some: slice) -> Tensor:
        here = channels[some]
        part = select_orders(orders, here)
        reached = _swap_some(problem.select(here), part, residual, [draw.select(some) for draw in draws])
        for order, found in zip(orders, part, strict=True):
            order[:, here] = found
        return reached

    return torch.cat(each_part(try_some, channels, _TOGETHER))


def _swap_some(problem: Problem, orders: Orders, residual: bool, draws: list[_Draw]) -> Tensor:
    """Tries what was drawn, and writes into the orders what helps; the objective that they reach then."""
    right, constant = without_residual(problem, residual)
    equations = _Equations(problem, right, Assembly(orders, problem.taps))
    every, reached = torch.arange(len(right), device=right.device), constant - equations.gained
    strips = (orders.horizontal, orders.vertical)
    for draw in draws:
        across, down = (strip[draw.edge[:, None], every[:, None], draw.pair] for strip in strips)
        places = torch.where(draw.branch[:, None] == 0, across, down)
        first, second = _numbers(draw.pair, problem.taps.tile).unbind(1)
        moved, onto = _taps_at(draw.branch, places, problem.taps).unbind(1)
        trial = equations.tried(_Exchange(first, second, moved, onto))
        value = constant - trial.gained
        better = value < reached
        reached = torch.where(better, value, reached)
        equations.keep(trial, better.nonzero().flatten())
        for branch, strip in enumerate(strips):
            here = (better & (draw.branch == branch)).nonzero().flatten()
            strip[draw.edge[here, None], here[:, None], draw.pair[here]] = places[here].flip(1)
    return reached


class _Draw(NamedTuple):
    """Which exchange is tried in each channel.

    Attributes:
        branch, edge: ``(C,)``.
        pair: ``(C, 2)``, two different tiles.
    """

    branch: Tensor
    edge: Tensor
    pair: Tensor

    @classmethod
    def of(cls, channels: int, tiles: int, edges: int, generator: torch.Generator, device: torch.device) -> _Draw:
        branch = (torch.rand(channels, generator=generator) >= 0.5).long()
        edge = torch.randint(edges, (channels,), generator=generator)
        pair = torch.rand(channels, tiles, generator=generator).topk(2, 1).indices
        return cls(*(each.to(device) for each in (branch, edge, pair)))

    def select(self, channels: slice) -> _Draw:
        """That of some channels."""
        return _Draw(*(each[channels] for each in self))


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
        gained: ``(C,)``: by how much J would lie below that of no taps; NaN where that cannot be told.
        sides: ``(C, 2 n n, K)``: [W, V]' times the inverse of N.
        middle: ``(C, 2 n n, 2 n n)``: what the inverse loses is sides' times the inverse of this times sides.
        more: ``(C, n n)``: M'r becomes M'r + V more.
    """

    exchange: _Exchange
    gained: Tensor
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

    def __init__(self, problem: Problem, right: Tensor, assembly: Assembly) -> None:
        """assembly: M, the taps that banks make."""
        self.gram, self.right, self.product = problem.gram, right, assembly.products(problem.gram)
        self.inverse = torch.cholesky_inverse(factor_symmetric(assembly.normal(self.product)))
        self.wanted = assembly.added(right[..., None])[..., 0]
        self.bank = (self.inverse @ self.wanted[..., None])[..., 0]

    @property
    def gained(self) -> Tensor:
        """``(C,)``: by how much J lies below that of no taps."""
        return (self.wanted * self.bank).sum(1)

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
        gained = self.gained + (more * (2 * of_bank + vv @ more)).sum((1, 2)) - less
        return _Trial(exchange, gained, torch.cat([along, across], 1), middle, more[..., 0])

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
            where = (channels[:, None, None], rows, numbers[:, None])
            self.product[where] += part

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
