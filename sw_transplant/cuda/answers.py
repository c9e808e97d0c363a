"""Answers about a device that are asked for once, unless what stood against them passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

PASSING = ("out of memory", "out_of_memory", "capture", "capturing", "no space left")


class Passing(Exception):
    """What is said now need not hold at the next call: it is not remembered.

    Attributes:
        said: how often something was said that need not hold: who decides by answers compares it before and after.
    """

    said = 0


def is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed later: memory was short, or a CUDA graph was being captured."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(word in str(error).lower() for word in PASSING)


class Remembered:
    """A function of one argument that is asked once for each value of it, until it raises no :class:`Passing`."""

    def __init__(self, function: Callable[[Any], str]) -> None:
        self._function = function
        self._answers: dict[Hashable, str] = {}
        self.__doc__ = function.__doc__

    def __call__(self, subject: Any) -> str:
        if subject not in self._answers:
            try:
                self._answers[subject] = self._function(subject)
            except Passing as now:
                Passing.said += 1
                return str(now)
        return self._answers[subject]

    def lasts(self, subject: Any) -> bool:
        """Whether the answer is remembered."""
        return subject in self._answers

    def cache_clear(self) -> None:
        """Forgets all answers."""
        self._answers.clear()
