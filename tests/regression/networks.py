"""The networks of the folders that are kept: their code must not change, or the folders would no longer fit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import sw_transplant as sw


class Strips(nn.Module):
    """A sum of strips with their BatchNorms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tall = nn.Conv2d(channels, channels, (9, 3), padding=(4, 1), groups=channels, bias=False)
        self.wide = nn.Conv2d(channels, channels, (3, 9), padding=(1, 4), groups=channels, bias=False)
        self.tall_norm, self.wide_norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.tall_norm(self.tall(x)) + self.wide_norm(self.wide(x))


def network() -> nn.Module:
    """Stride, channel multiplier, padding "same", an even kernel, a sum, and a layer under two names."""
    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 7, padding=3, groups=4)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(4, 4, 8, padding="same", groups=4),
        Strips(4),
        shared,
        nn.ReLU(),
        shared,
        nn.Conv2d(4, 8, 7, stride=2, padding=3, dilation=2, groups=4),
    )
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 12, 12))
    return model.eval()


def square() -> nn.Module:
    """What the paper's module can take the place of."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 9, padding=4, groups=4)).eval()


KINDS: dict[str, tuple[Callable[[], nn.Module], sw.SWConfig]] = {
    "laid_out": (network, sw.SWConfig()),
    "tile3": (network, sw.SWConfig(tile=3, merge_parallel=False, form="shift", nonfinite="local")),
    "edges": (network, sw.SWConfig(edges=2)),
    "shiftwise": (square, sw.SWConfig(mode="shiftwise")),
}
"""Name of a folder: the original's constructor, and how it was converted."""
