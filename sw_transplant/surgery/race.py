"""Which of several is the fastest, and whether that is certain: times taken side by side until it is, within a bound.

Times on a machine that does other things, too, are wrong by more than what is to be told apart. Times of one round are
wrong alike: so what is counted is in how many rounds one was faster than the other, and not by how much (a sign test).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb
from statistics import median

DOUBT = 1e-3
"""How likely chance alone may be to give what was counted, for it to count as certain."""
MOST = 60
"""Rounds after which what is not certain stays so."""


class Race:
    """One is the default, which the others have to beat: round after round, until it is certain which is the fastest.

    Args:
        names: who runs.
        default: the one of them that is taken as long as no other is certainly faster.
        least: rounds before anything is decided.

    Raises:
        ValueError: the default does not run, or there is no round.
    """

    def __init__(self, names: Sequence[str], default: str, least: int) -> None:
        if default not in names:
            raise ValueError(f"Race: default {default!r}, expected one of {list(names)}")
        if least < 1:
            raise ValueError(f"rounds: got {least}, expected at least 1")
        self.default, self.least = default, least
        self.times: dict[str, list[float]] = {name: [] for name in names}
        self._running = list(names)
        self._rounds = 0

    @property
    def rounds(self) -> int:
        """How many there were."""
        return self._rounds

    def order(self) -> list[str]:
        """Who runs in the next round, in turn from the front and from the back; nobody once it is decided."""
        if self._rounds >= self.least and (self.certain or self._rounds >= max(MOST, self.least)):
            return []
        return self._running[:: -1 if self._rounds % 2 else 1]

    def add(self, times: Mapping[str, float]) -> None:
        """The times of a round. Who is certainly slower than the default runs no more."""
        for name, value in times.items():
            self.times[name].append(value)
        self._rounds += 1
        if self._rounds >= self.least:
            self._running = [name for name in self._running if not self._is_faster(self.default, name)]

    @property
    def milliseconds(self) -> dict[str, float]:
        """Of each the median."""
        return {name: median(values) for name, values in self.times.items() if values}

    @property
    def leader(self) -> str:
        """Of those that run the fastest in the median."""
        known = self.milliseconds
        return min(self._running, key=lambda name: known[name])

    @property
    def certain(self) -> bool:
        """Whether the leader is certainly faster than the default, or the default than all others."""
        return self._running == [self.default] or self._is_faster(self.leader, self.default)

    @property
    def winner(self) -> str:
        """The leader where that is certain, else the default."""
        return self.leader if self.certain else self.default

    def _is_faster(self, one: str, other: str) -> bool:
        pairs = list(zip(self.times[one], self.times[other], strict=False))  # of the rounds that both ran
        wins, losses = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
        return wins > losses and chance(wins, losses) <= DOUBT


def chance(wins: int, losses: int) -> float:
    """How likely a fair coin is to fall as unevenly as this, on either side (the sign test)."""
    count, fewer = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(comb(count, k) for k in range(fewer + 1)) / 2**count)
