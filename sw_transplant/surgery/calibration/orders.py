"""Choosing orders: the module's are random, but nothing says that they have to be the first that were drawn.

For each channel the best of several drawn orders, by the error in closed form; then swaps of two tiles' places in one
edge, at random, kept where they help. All channels try at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sw_transplant.layers.orders import Orders, draw_orders
from sw_transplant.surgery.calibration.fit import (
    Problem,
    least_possible,
    objective_of,
    without_residual,
)
from sw_transplant.surgery.calibration.swaps import swap

_ROUND = 50
"""Exchanges that are tried before looking again which channels have something to gain."""

_GAP = 0.01
"""Of a channel's energy: what is closer than that to the best that strips can do is good enough."""


def choose_orders(
    problem: Problem, edges: int, seed: int, *, candidates: int, swaps: int, residual: bool
) -> tuple[Orders, Tensor, Tensor]:
    """The orders for a layer.

    Args:
        problem: of the layer.
        edges: E.
        seed: of the first candidate, which is what the module would draw itself, and of the swaps.
        candidates: how many are drawn.
        swaps: how many are tried in each channel that has something to gain, rounded up to rounds.
        residual: whether the module adds its input.

    Returns:
        orders: int32, on the problem's device.
        before, after: float64 ``(C,)``: the objective of the first candidate, and that of the chosen orders.
    """
    channels, tiles = len(problem.right), problem.taps.whole // problem.taps.tile
    device = problem.gram.device
    best: Orders | None = None
    right, constant = without_residual(problem, residual)
    for number in range(candidates):
        drawn = Orders(*(o.to(device) for o in draw_orders(channels, tiles, edges, seed + number)))
        value = objective_of(problem, drawn, right, constant)
        if best is None:
            best, before, lowest = drawn, value, value.clone()
        else:
            better = value < lowest
            best = Orders(*(torch.where(_over(better, a), a, b) for a, b in zip(drawn, best, strict=True)))
            lowest = torch.where(better, value, lowest)
    assert best is not None
    least = least_possible(problem)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(-(-swaps // _ROUND)):
        # Where the drawn orders do what any strips could do, there is nothing to choose.
        open_ = (lowest - least > _GAP * problem.energy.clamp(min=0) + 1e-6 * least.abs()).nonzero().flatten()
        if not len(open_):
            break
        part = Orders(*(order[:, open_] for order in best))
        found, reached = swap(
            problem.select(open_), right[open_], constant[open_], part, lowest[open_], _ROUND, generator
        )
        for order, new in zip(best, found, strict=True):
            order[:, open_] = new
        lowest[open_] = reached
    return best, before, lowest


def _over(mask: Tensor, order: Tensor) -> Tensor:
    """``(C,)`` as ``(1, C, 1)`` or ``(1, C)``."""
    return mask[None, :, None] if order.dim() == 3 else mask[None]
