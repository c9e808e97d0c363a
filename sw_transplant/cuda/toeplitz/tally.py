"""Counting the products of a plan: the `ops` that do nothing but count."""

from collections.abc import Sequence
from typing import Any


class Tally:
    """Matrix products, and words of shared memory that the lanes load for them, over all warps that share the work.

    A warp takes one of the entries of a `choose`; together they take each of them once.
    """

    def __init__(self, warps: int = 1) -> None:
        self.products = self.loads = 0
        self._times = warps

    def nothing(self) -> None:
        return None

    no_operand = nothing

    def load(self, at: Any, offset: int) -> None:
        self.loads += self._times

    def load_matrix(self, at: Any, offset: int, count: int = 4, transposed: bool = False) -> list[None]:
        self.loads += count * self._times
        return [None] * count

    def splice(self, first: Any, second: Any) -> None:
        return None

    def mma(self, a: Any, b: Any, c: list[Any]) -> list[Any]:
        self.products += self._times
        return c

    def add(self, first: list[Any], second: list[Any]) -> list[Any]:
        return first

    def repeat(self, times: int, body: Any, state: list[Any], first: Any = 0, by: int = 1) -> list[Any]:
        before, self._times = self._times, self._times * times
        body(0, state)
        self._times = before
        return state

    def choose(self, which: Any, variants: Sequence[Any], table: Sequence[int] | None = None) -> list[Any]:
        table = range(len(variants)) if table is None else table
        before, results = self._times, []
        for number, variant in enumerate(variants):
            self._times = before * list(table).count(number) // len(table)
            results.append(variant())
        self._times = before
        return results[0]

    def store_pair(self, at: Any, offset: int, first: Any, second: Any) -> None:
        return None
