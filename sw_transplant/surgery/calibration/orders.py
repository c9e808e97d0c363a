"""Choosing orders: the module's are random, but nothing says that they have to be the first that were drawn.

For each channel the best of several drawn orders, by the error in closed form; then swaps of two tiles' places in one
edge, at random, kept where they help.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sw_transplant.layers.orders import Orders, draw_orders
from sw_transplant.surgery.calibration.fit import Problem, least_possible, objectives
from sw_transplant.surgery.calibration.swaps import swap

_ROUND = 75
"""Exchanges that are tried before looking again which channels have something to gain."""

_GAP = 0.01
"""Of a channel's energy: what is closer than that to the best that strips can do is good enough."""


class Choice(NamedTuple):
    """What was chosen for a layer.

    Attributes:
        orders: int32, on the problem's device.
        residual: whether the module adds its input.
        before, after: float64 ``(C,)``: the objective of the first candidate, and that of the chosen orders.
        least: that of strips whose taps are all free.
    """

    orders: Orders
    residual: bool
    before: Tensor
    after: Tensor
    least: Tensor


def choose_orders(problem: Problem, edges: int, seed: int, *, candidates: int, swaps: int) -> Choice:
    """The orders for a layer, and whether its module adds its input, as the paper's does: not where a bank comes closer
    without, as of kernels that have no marked centre.

    Args:
        problem: of the layer.
        edges: E.
        seed: of the first candidate, which is what the module would draw itself, and of the swaps.
        candidates: how many are drawn.
        swaps: how many are tried in each channel that has something to gain, rounded up to rounds.
    """
    channels, tiles = len(problem.right), problem.taps.whole // problem.taps.tile
    device = problem.gram.device

    def drawn(number: int) -> Orders:
        return Orders(*(order.to(device) for order in draw_orders(channels, tiles, edges, seed + number)))

    best = drawn(0)
    without, with_input = objectives(problem, best).unbind(1)
    residual = float(with_input.sum()) <= float(without.sum())
    before = with_input if residual else without
    lowest = before.clone()
    for number in range(1, candidates):
        best, lowest = _better(problem, residual, drawn(number), best, lowest)
    least = least_possible(problem)
    found, reached = Orders(*(order.clone() for order in best)), lowest.clone()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(-(-swaps // _ROUND)):
        # Where the drawn orders do what any strips could do, there is nothing to choose.
        open_ = (reached - least > _GAP * problem.energy.clamp(min=0) + 1e-6 * least.abs()).nonzero().flatten()
        if not len(open_):
            break
        reached[open_] = swap(problem, found, residual, open_, _ROUND, generator)
    if bool((reached < lowest).any()):  # solved anew before it is believed
        best, lowest = _better(problem, residual, found, best, lowest)
    return Choice(best, residual, before, lowest, least)


def _better(problem: Problem, residual: bool, orders: Orders, best: Orders, lowest: Tensor) -> tuple[Orders, Tensor]:
    """The better of two for each channel, and the objective; that of the second is known."""
    value = objectives(problem, orders)[:, int(residual)]
    better = value < lowest
    chosen = (
        torch.where(better[None, :, None] if new.dim() == 3 else better, new, old)
        for new, old in zip(orders, best, strict=True)
    )
    return Orders(*chosen), torch.where(better, value, lowest)
