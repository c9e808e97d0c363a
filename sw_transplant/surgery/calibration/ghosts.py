"""Which channels bypass the modules: those whose responses are missed least, as the network sees it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def cheapest(cost: Tensor, count: int) -> tuple[int, ...]:
    """The channels of least cost, ascending.

    Args:
        cost: ``(C,)``, what it costs that a channel bypasses the module: the squared error of its response then, less
            that of the best fit, times what the network makes of an error there.
        count: how many.
    """
    return tuple(sorted(cost.cpu().argsort(stable=True)[:count].tolist()))


def exchange(ghosts: tuple[int, ...], linear: Tensor, quadratic: Tensor) -> tuple[int, ...]:
    """Exchanges a ghost for an active channel, the best pair first, while that lowers what all of them cost together.

    With z the indicator of the ghosts that is ``2 linear z + z' quadratic z``: errors of channels may cancel.

    Args:
        ghosts: to start from.
        linear: ``(C,)``.
        quadratic: ``(C, C)``, symmetric.
    """
    chosen = torch.zeros_like(linear, dtype=torch.bool)
    chosen[list(ghosts)] = True
    diagonal = quadratic.diagonal()
    for _ in range(len(linear)):
        slope = 2 * linear + 2 * quadratic @ chosen.to(linear)
        leave, enter = diagonal - slope, diagonal + slope
        change = leave[:, None] + enter - 2 * quadratic
        change[~chosen] = torch.inf
        change[:, chosen] = torch.inf
        best = int(change.argmin())
        out, into = divmod(best, len(linear))
        if not float(change[out, into]) < -1e-9 * float(diagonal.abs().sum()):
            break
        chosen[out], chosen[into] = False, True
    return tuple(chosen.nonzero().flatten().tolist())


def share_out(costs: Mapping[str, tuple[Tensor, Tensor]], share: float) -> dict[str, int]:
    """How many ghosts each layer gets where one budget is for all: the mean of the layers' shares.

    A ghost of a layer of C channels takes 1 / C of the budget. What another one of a layer costs grows with those that
    it has, since their errors add up. The cheapest for what it takes comes first. No layer gets more than twice the
    mean share: costs are estimates to first order, good for few ghosts only.

    Args:
        costs: by layer, linear ``(C,)`` and quadratic ``(C, C)`` as for :func:`exchange`, of one scale for all.
        share: the mean share of ghosts.

    Returns:
        By layer, how many.
    """
    quota = dict.fromkeys(costs, 0)
    margins = {path: (2 * linear + quadratic.diagonal()).cpu() for path, (linear, quadratic) in costs.items()}
    left = share * len(costs)
    while True:
        offers = []
        for path, margin in margins.items():
            size = len(margin)
            room = min(2 * share * size, size - 2)
            if quota[path] + 1 <= room + 1e-9 and left >= 1 / size - 1e-9:
                channel = int(margin.argmin())
                offers.append((float(margin[channel]) * size, path, channel))
        if not offers:
            return quota
        _, path, channel = min(offers)
        quota[path] += 1
        left -= 1 / len(margins[path])
        margins[path] += 2 * costs[path][1][:, channel].cpu()
        margins[path][channel] = torch.inf
