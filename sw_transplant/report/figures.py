"""Figures: made without pyplot, which keeps state of the whole process, and readable without colour."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HATCHES = ("", "///", "...", "xxx")
"""Of the first, second, ... bar beside each other: they differ without colour, too."""
GREYS = ("0.35", "0.75", "0.95", "0.55")
LONGEST = 40
"""Bars in one picture."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "sw-transplant[plot]"', name="matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def to_png(figure: Figure, dpi: int = 110) -> bytes:
    """The picture as the content of a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()


def bars(
    title: str,
    names: Sequence[str],
    series: dict[str, Sequence[float]],
    axis: str,
    shown: str,
    *,
    end: float | None = None,
) -> Figure:
    """Horizontal bars, one group for each name, each with its number beside it.

    Args:
        title: of the picture.
        names: of the groups, from top to bottom; those beyond ``LONGEST`` are left out, and the title says so.
        series: by the name of a series the length of its bar in each group.
        axis: what the numbers are.
        shown: format of the numbers.
        end: of the axis; None for what the bars need.
    """
    left_out = max(0, len(names) - LONGEST)
    names = list(names)[:LONGEST]
    count = len(series)
    figure = new_figure(8, 1.3 + 0.26 * len(names) * (0.5 + 0.5 * count))
    axes: Any = figure.subplots()
    for k, (name, values) in enumerate(series.items()):
        places = [index + (k - (count - 1) / 2) * 0.8 / count for index in range(len(names))]
        drawn = axes.barh(
            places, list(values)[:LONGEST], 0.8 / count, label=name, color=GREYS[k], hatch=HATCHES[k], edgecolor="black"
        )
        axes.bar_label(drawn, labels=[format(value, shown) for value in list(values)[:LONGEST]], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.15)
    if end is not None:
        axes.set_xlim(0, end * 1.08)  # room for the number beside a bar that fills it
    axes.set_xlabel(axis)
    axes.set_title(title + (f" (the first {LONGEST} of {LONGEST + left_out})" if left_out else ""), fontsize=10)
    if count > 1:
        figure.legend(loc="outside lower center", fontsize=8, ncols=count)
    return figure
