"""Choosing orders: the module's are random, but nothing says that they have to be the first that were drawn.

For each channel the best of several drawn orders, by the error in closed form; then swaps of two tiles' places in one
edge, at random, kept where they help. A trial changes 2 n n columns of the assembly, so 2 n n rows and columns of the
normal equations: all channels try at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sw_transplant.layers.orders import Orders, draw_orders
from sw_transplant.surgery.calibration.fit import (
    Problem,
    assembly,
    least_possible,
    solve_symmetric,
    without_residual,
)

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
        normal, products, _ = _normal(problem, right, assembly(drawn, problem.taps).sum(1))
        value = _objective(constant, normal, products)
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
        found, reached = _swap(problem.select(open_), right[open_], constant[open_], part, lowest[open_], generator)
        for order, new in zip(best, found, strict=True):
            order[:, open_] = new
        lowest[open_] = reached
    return best, before, lowest


def _over(mask: Tensor, order: Tensor) -> Tensor:
    """``(C,)`` as ``(1, C, 1)`` or ``(1, C)``."""
    return mask[None, :, None] if order.dim() == 3 else mask[None]


def _normal(problem: Problem, right: Tensor, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    product = problem.gram @ made
    return made.mT @ product, (made.mT @ right[..., None])[..., 0], product


def _objective(constant: Tensor, normal: Tensor, right: Tensor) -> Tensor:
    return constant - (solve_symmetric(normal, right) * right).sum(1)


def _swap(
    problem: Problem, right: Tensor, constant: Tensor, orders: Orders, lowest: Tensor, generator: torch.Generator
) -> tuple[Orders, Tensor]:
    """Tries :data:`_ROUND` exchanges in every channel; orders and objective are those that it found."""
    horizontal, vertical, identity = (order.clone() for order in orders)
    lowest = lowest.clone()
    edges, channels, tiles = horizontal.shape
    device, size = horizontal.device, problem.taps.tile**2
    every = torch.arange(channels, device=device)
    made = assembly(orders, problem.taps).sum(1)  # (C, P, K)
    normal, products, _ = _normal(problem, right, made)
    for _ in range(_ROUND):
        branch = torch.rand(channels, generator=generator).to(device) < 0.5
        edge = torch.randint(edges, (channels,), generator=generator).to(device)
        pair = torch.rand(channels, tiles, generator=generator).topk(2, 1).indices.to(device)  # two different tiles
        tried = []
        for order, mine in ((horizontal, branch), (vertical, ~branch)):
            new = order.clone()
            one, other = order[edge, every, pair[:, 0]], order[edge, every, pair[:, 1]]
            new[edge, every, pair[:, 0]] = torch.where(mine, other, one)
            new[edge, every, pair[:, 1]] = torch.where(mine, one, other)
            tried.append(new)
        columns = (pair[:, :, None] * size + torch.arange(size, device=device)).flatten(1)  # (C, 2 n n)
        trial = Orders(tried[0], tried[1], identity)
        fresh = _columns(trial, pair, problem)  # (C, P, 2 n n)
        image = problem.gram @ fresh  # (C, P, 2 n n)
        own = fresh.mT @ image
        touched = (made.mT @ image).scatter(1, columns[:, :, None].expand_as(own), own)  # (C, K, 2 n n)
        changed = normal.scatter(2, columns[:, None].expand_as(touched), touched)
        changed = changed.scatter(1, columns[:, :, None].expand_as(touched.mT), touched.mT)
        moved = products.scatter(1, columns, (fresh.mT @ right[..., None])[..., 0])
        value = _objective(constant, changed, moved)
        better = (value < lowest).nonzero().flatten()
        for whole, new in ((lowest, value), (normal, changed), (products, moved)):
            whole[better] = new[better]
        made[better] = made[better].scatter(2, columns[better, None].expand_as(fresh[better]), fresh[better])
        horizontal[:, better], vertical[:, better] = trial.horizontal[:, better], trial.vertical[:, better]
    return Orders(horizontal, vertical, identity), lowest


def _columns(orders: Orders, pair: Tensor, problem: Problem) -> Tensor:
    """The columns of the assembly that belong to two tiles of each channel, ``(C, P, 2 n n)``."""
    strips = [order.gather(2, pair[None].expand(len(order), -1, -1)).long() for order in orders[:2]]
    taps = problem.taps
    n, whole = taps.tile, taps.whole
    tiles = whole // n
    place = torch.eye(tiles, dtype=torch.float64, device=pair.device)
    one = torch.eye(n, dtype=torch.float64, device=pair.device)
    along, down = (place[order].sum(0) for order in strips)  # (C, 2, place)
    taken = (orders.identity[:, :, None] == pair[None]).sum(0).double()  # (C, 2)
    shape = (len(pair), n * whole, 2 * n * n)
    made = torch.cat(
        [
            torch.einsum("ctp,ia,jb->cipjtab", along, one, one).reshape(shape),
            torch.einsum("ctp,ia,jb->cpijtab", down, one, one).reshape(shape),
        ],
        1,
    )
    small = torch.einsum("ct,ia,jb->cijtab", taken, one, one).reshape(len(pair), n, n, -1)
    first = taps.across.start - taps.along.start
    made[:, : n * whole].view(len(pair), n, whole, -1)[:, :, first : first + n] += small
    return made
