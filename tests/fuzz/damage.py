"""Damage to files: cut off, bits flipped, parts repeated, headers that promise too much, JSON with other values."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 0.5, -1e308, 1e400, "", "auto", "..", "\x00", "ключ"),
    *(2**31, 2**63, 10**30),
    *([], {}, [1, 2], [[]], {"a": 1}, [None], ["x"] * 3, [-1, 0], [2**40, 2**40], [2**62] * 4),
)


def damage_bytes(content: bytes, draw: random.Random) -> bytes:
    """One to three kinds of damage to any file."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        draw.choice(BYTES)(data, draw)
    return bytes(data)


def _cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data) + 1) :]


def _flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 4, 64))):
        if data:
            data[draw.randrange(min(len(data), draw.choice((8, 400, len(data)))))] ^= 1 << draw.randrange(8)


def _repeat(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data) + 1)
    part = data[start : start + draw.randrange(1, 200)]
    place = draw.randrange(len(data) + 1)
    data[place:place] = part


def _remove(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data) + 1)
    del data[start : start + draw.randrange(1, 200)]


def _overwrite(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data) + 1)
    data[start : start + draw.choice((1, 8, 40))] = draw.randbytes(draw.choice((1, 8, 40)))


def _promise(data: bytearray, draw: random.Random) -> None:
    """A header, as safetensors begins with, that is longer than the file."""
    data[:8] = draw.choice((0, 1, len(data), 2**20, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little")


BYTES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _cut,
    _flip,
    _flip,
    _repeat,
    _remove,
    _overwrite,
    _promise,
)


def damage_values(content: Any, draw: random.Random) -> Any:
    """JSON with one to three entries changed, removed, added or doubled, anywhere in it."""
    made = copy.deepcopy(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_places(made))
        if not places:
            return _value(draw)
        holder, key = draw.choice(places)
        kind = draw.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[draw.choice(("version", "path", "unknown", "weight", "edges"))] = _value(draw)
        elif kind == 1:
            holder.append(_value(draw))
        elif kind == 2 and type(holder[key]) is int:
            holder[key] = draw.choice((holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2**20, 2**40))
        else:
            holder[key] = _value(draw)
    return made


def _value(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(VALUES))  # or one of them could come to hold itself


def _places(value: Any) -> Any:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(entries):
        yield value, key
        yield from _places(entry)


def as_text(value: Any, draw: random.Random) -> str:
    """JSON, now and then nested deeper than any parser goes."""
    if draw.randrange(200) == 0:
        return "[" * 100_000
    if draw.randrange(200) == 0:
        return '{"version": ' + "9" * 10_000 + "}"
    return json.dumps(value)
