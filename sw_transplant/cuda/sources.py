"""What a kernel is before it is compiled: a Python function with its signature, and the name of who makes it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple


class KernelSource(NamedTuple):
    """A kernel before compilation: the Python function and its Numba signature, with pointers for tensors."""

    function: Callable[..., None]
    signature: Any
    launch_bounds: tuple[int, int] | None = None  # most threads of a block, fewest blocks on a multiprocessor


class Factory(NamedTuple):
    """A function that makes a :class:`KernelSource`, by name.

    Its module, which imports Numba, is not imported before there is something to compile; and a name says in another
    process what is meant.
    """

    module: str
    name: str

    def __call__(self, *key: Hashable) -> KernelSource:
        return getattr(importlib.import_module(self.module), self.name)(*key)  # type: ignore[no-any-return]


class Job(NamedTuple):
    """A kernel to be had: who makes it, what it is specialised for, and the compute capability of the device."""

    factory: Factory
    key: tuple[Hashable, ...]
    capability: tuple[int, int]
