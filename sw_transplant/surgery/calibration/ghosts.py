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
