"""Which channels bypass the modules: those whose responses are missed least, as the network sees it."""

from __future__ import annotations

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
