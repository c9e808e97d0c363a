"""Effective receptive fields side by side, in greys, with the squares of the published table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sw_transplant.report.figures import new_figure
from sw_transplant.science.erf import SHARES, high_contribution_square, log_contributions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = ("solid", "dashed", "dashdot", "dotted")
"""Of the squares, from the smallest share to the largest: they differ without colour, too."""


def plot_receptive_field(matrices: Mapping[str, Tensor]) -> Figure:
    """How much every pixel contributes to the centre of a network's last map, and the squares that hold most of it.

    What is shown is the logarithm that the published table measures: white is nothing, black most. A square holds the
    share t of it that stands beside its line, and has the area r of the image.

    Args:
        matrices: by the name of a network, of :func:`sw_transplant.science.effective_receptive_field`.

    Raises:
        ValueError: no matrix, or one that is none of contributions.
        ImportError: matplotlib is not installed.
    """
    if not matrices:
        raise ValueError("plot_receptive_field: no matrix, expected at least one network's")
    squares = {name: [high_contribution_square(matrix, t) for t in SHARES] for name, matrix in matrices.items()}
    figure = new_figure(0.6 + 3.9 * len(matrices), 4.9)
    grid: Any = figure.subplots(1, len(matrices), squeeze=False)[0]
    image: Any = None
    for axes, (name, matrix) in zip(grid, matrices.items(), strict=True):
        size = matrix.shape[-1]
        shown = log_contributions(matrix).numpy()
        image = axes.imshow(shown, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        for share, square, line in zip(SHARES, squares[name], LINES, strict=True):
            first = size // 2 - square.side // 2 if square.side < size else 0
            sides = [first - 0.5, first + square.side - 0.5]
            xs, ys = [sides[0], sides[1], sides[1], sides[0], sides[0]], [sides[0]] * 2 + [sides[1]] * 2 + [sides[0]]
            axes.plot(xs, ys, color="white", linewidth=2.6, solid_joinstyle="miter")  # to be seen on black, too
            label = f"t = {100 * share:g}%: r = {100 * square.ratio:.1f}%"
            axes.plot(xs, ys, color="black", linewidth=1.2, linestyle=line, label=label)
        axes.set_xlim(-0.5, size - 0.5)
        axes.set_ylim(size - 0.5, -0.5)
        axes.set_xticks([0, size - 1])
        axes.set_yticks([0, size - 1])
        axes.tick_params(labelsize=7)
        axes.set_title(name, fontsize=9)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), fontsize=8, ncols=2, handlelength=3)
    figure.suptitle("Effective receptive field", fontsize=10)
    figure.colorbar(image, ax=list(grid), shrink=0.7, label="logarithm of the contribution, at most 1")
    return figure
