"""The kernel that a layer's tiles make: assembled, and what each edge adds to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sw_transplant.equivalence import assemble
from sw_transplant.layers.placed_tiles import PlacedTiles
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.report.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERED = 60
"""Tiles of a kernel up to which each is numbered in the picture."""
MOST_EDGES = 4


class Edge(NamedTuple):
    """What one edge of a branch adds to a channel's kernel.

    Attributes:
        kernel: ``(kh, kw)``.
        rows: ``(P, 3)``, where it puts which tile: rows ``(tile, dy, dx)``.
    """

    kernel: Tensor
    rows: Tensor


def plot_kernel(module: ShiftwiseConv2d, channel: int = 0) -> Figure:
    """The kernel of one channel of a layer: a row for each branch, assembled, then what each of its edges adds.

    Mid-grey is zero, lighter is positive, darker is negative; lines are the borders of tiles, numbers say which tile
    lies there. BatchNorms are not folded in.

    Args:
        module: a converted layer.
        channel: which of the output channels (of those that do not bypass the paper's module).

    Returns:
        A matplotlib figure; ``figure.savefig("kernel.png")`` writes it.

    Raises:
        ValueError: no such channel, or a layer that is one identity.
        ImportError: matplotlib is not installed.
    """
    branches = [part for part in module.parts() if not part.is_identity]
    count = branches[0].bank.shape[0] if branches else 0
    if not 0 <= channel < count:
        raise ValueError(f"plot_kernel: channel {channel}, expected 0 to {count - 1}")
    rows = [edges_of(module, branch, channel) for branch in branches]
    columns = 1 + max(min(len(edges), MOST_EDGES) if len(edges) > 1 else 0 for edges in rows)
    wholes = [
        Edge(torch.stack([edge.kernel for edge in edges]).sum(0), torch.cat([edge.rows for edge in edges]))
        for edges in rows
    ]
    limit = max(float(edge.kernel.abs().max()) for edges in (*rows, wholes) for edge in edges) or 1.0
    figure = new_figure(0.8 + 2.7 * columns, 0.7 + 2.6 * len(rows))
    grid: Any = figure.subplots(len(rows), columns, squeeze=False)
    image: Any = None
    for k, (line, branch, edges, whole) in enumerate(zip(grid, branches, rows, wholes, strict=True)):
        shown = [("assembled", whole, len(edges) == 1)]
        shown += [(f"edge {e + 1}", edge, True) for e, edge in enumerate(edges[:MOST_EDGES]) if len(edges) > 1]
        for axes, (title, edge, numbered) in zip(line, shown, strict=False):
            image = _draw(axes, edge, branch.bank.shape[2], limit, numbered)
            size = "x".join(map(str, branch.geometry.kernel_size))
            axes.set_title(f"branch {k + 1}, {size}: {title}", fontsize=8)
        for axes in line[len(shown) :]:
            axes.set_axis_off()
    figure.suptitle(f"{type(module).__name__}, channel {channel} of {count}", fontsize=10)
    figure.colorbar(image, ax=grid, shrink=0.8, label="weight")
    return figure


@torch.no_grad()
def edges_of(module: ShiftwiseConv2d, branch: PlacedTiles, channel: int) -> list[Edge]:
    """What each edge of a branch adds to the kernel of a channel; they sum up to it, without its BatchNorm."""
    if isinstance(module, SWConv2d) and not module.merged:
        count = module.edges
    else:
        count = 1 if branch.gain is None else len(branch.gain)
    bank, table = branch.bank[channel : channel + 1].float().cpu(), branch.rows.cpu()
    table = table[channel if table.shape[0] > 1 else 0]
    made = []
    for e, rows in enumerate(table.chunk(count)):
        kernel = assemble(bank, rows, branch.geometry.kernel_size)[0, 0]
        if branch.gain is not None:
            gain = branch.gain[e].detach().float().cpu().reshape(-1)
            kernel = kernel * gain[channel if len(gain) > 1 else 0]
        made.append(Edge(kernel, rows))
    return made


def _draw(axes: Any, edge: Edge, tile: int, limit: float, numbered: bool) -> Any:
    (kh, kw), rows = edge.kernel.shape, edge.rows.tolist()
    image = axes.imshow(edge.kernel.numpy(), cmap="gray", vmin=-limit, vmax=limit, interpolation="nearest")
    for number, dy, dx in rows:
        if number < 0:
            continue
        top, left = max(dy, 0), max(dx, 0)
        bottom, right = min(dy + tile, kh), min(dx + tile, kw)
        if top >= bottom or left >= right:
            continue
        sides = ([left, right, right, left, left], [top, top, bottom, bottom, top])
        axes.plot([x - 0.5 for x in sides[0]], [y - 0.5 for y in sides[1]], color="black", linewidth=0.7)
        if numbered and len(rows) <= NUMBERED:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.75}
            place = ((left + right - 1) / 2, (top + bottom - 1) / 2)
            axes.text(*place, str(number), ha="center", va="center", fontsize=6, bbox=box)
    axes.set_xticks([0, kw - 1])
    axes.set_yticks([0, kh - 1])
    axes.tick_params(labelsize=7)
    return image
