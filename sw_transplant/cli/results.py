"""What a command gives back."""

from __future__ import annotations

from typing import Any, NamedTuple


class Result(NamedTuple):
    """What a command found: as text, as values for JSON, and the exit code: 1 where models differ too much, else 0."""

    text: str
    values: dict[str, Any]
    code: int = 0
