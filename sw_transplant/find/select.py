"""Which layers of a model are meant: glob patterns of paths, or a function."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence

from torch import nn

Select = str | Sequence[str] | Callable[[str, nn.Module], bool] | None
"""Which layers to convert: glob patterns of paths (a pattern also selects all below what it names), or a function of
path and module; None selects all."""


def selector(paths: list[str], select: Select) -> Callable[[str, nn.Module], bool]:
    """Whether a layer at a path is meant.

    Args:
        paths: of all layers that there are.
        select: as in :data:`Select`.

    Raises:
        ValueError: a pattern that names none of them, or something else than patterns or a function.
    """
    if select is None:
        return lambda path, module: True
    if callable(select):
        return lambda path, module: bool(select(path, module))
    if not isinstance(select, (str, Sequence)):
        raise ValueError(
            f"select: got {select!r:.60}, expected glob patterns of layer paths, or a function of path and module"
        )
    patterns = [select] if isinstance(select, str) else list(select)

    def matches(path: str, pattern: str) -> bool:
        return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}.*")

    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"select: got an entry {pattern!r}, expected glob patterns of layer paths or one function")
        if not any(matches(path, pattern) for path in paths):
            raise ValueError(f"select: pattern {pattern!r} names no layer of the model; see model.named_modules()")
    return lambda path, module: any(matches(path, pattern) for pattern in patterns)
