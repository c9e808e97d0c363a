"""The times that a benchmark has written down."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sw_transplant.report.figures import bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIR = ("native", "converted")


def plot_throughput(results: str | os.PathLike[str]) -> Figure:
    """How fast original and converted models are, of a JSON file that a benchmark of ``benchmarks/`` wrote.

    Args:
        results: the file: an object with ``rows``, each with the milliseconds ``native`` and ``converted`` and with
            what names it (``model``, ``batch``, ``size``, ``format``, ``dtype``).

    Raises:
        ValueError: no such file, or no such rows.
        ImportError: matplotlib is not installed.
    """
    path = Path(results)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in content["rows"] if all(_is_time(row.get(name)) for name in PAIR)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"plot_throughput: {path}: no results of a benchmark ({error!r:.200})") from error
    if not rows:
        raise ValueError(f"plot_throughput: {path}: no row has milliseconds {PAIR[0]} and {PAIR[1]}")
    device = content.get("environment", {}).get("device", "")
    series: dict[str, Sequence[float]] = {name: [row[name] for row in rows] for name in PAIR}
    return bars(f"Time of a call, {device}", [_name(row) for row in rows], series, "milliseconds", ".3g")


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _name(row: dict[str, Any]) -> str:
    parts = [str(row.get("model", ""))]
    parts += [f"{name} {row[name]}" for name in ("batch", "size") if name in row]
    parts += [str(row[name]) for name in ("format", "dtype") if name in row]
    return ", ".join(part for part in parts if part)
