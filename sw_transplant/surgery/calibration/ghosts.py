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


def share_out(costs: Mapping[str, Tensor], share: float) -> dict[str, int]:
    """How many ghosts each layer gets where one budget is for all: the mean of the layers' shares.

    A ghost of a layer of C channels takes 1 / C of the budget. The cheapest for what they take come first; two channels
    of each layer at least stay active.

    Args:
        costs: by layer, ``(C,)`` as for :func:`cheapest`, of one scale for all.
        share: the mean share of ghosts.

    Returns:
        By layer, how many.
    """
    quota = dict.fromkeys(costs, 0)
    offers = sorted(
        (float(value) * len(cost), path) for path, cost in costs.items() for value in torch.sort(cost).values
    )
    left = share * len(costs)
    for _, path in offers:
        size = len(costs[path])
        if quota[path] < size - 2 and left >= 1 / size - 1e-9:
            quota[path] += 1
            left -= 1 / size
    return quota
