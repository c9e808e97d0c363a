"""From what reading found at a site to its description, a :class:`Match`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sw_transplant.config import SWConfig
from sw_transplant.equivalence import choose_tile
from sw_transplant.find.linear import LinearBranch
from sw_transplant.find.match import Match, SourceBranch
from sw_transplant.find.shared import shared_parameters
from sw_transplant.geometry import Size


def describe(site: nn.Module, paths: Sequence[str], branches: Sequence[LinearBranch], config: SWConfig) -> Match:
    """What is to be replaced, and by which tiles.

    Args:
        site: the module.
        paths: the places that hold it, its own first.
        branches: the sum that its forward is.
        config: of the conversion.
    """
    convolutions = [b for b in branches if b.weight is not None]
    largest = max((b.geometry.kernel_size for b in convolutions), key=lambda size: size[0] * size[1])
    tile = config.tile or choose_tile(largest)
    sources = tuple(
        # A tile larger than the kernel would only add taps that stay zero.
        SourceBranch(b.weight, b.bias, b.bn, b.geometry, config.tile or min(tile, max(b.geometry.kernel_size)))
        if b.weight is not None
        else SourceBranch(None, None, b.bn, b.geometry, tile)
        for b in branches
    )
    (in_channels, out_channels), before = channels_of(convolutions), sum(p.numel() for p in site.parameters())
    taps_before = sum(b.geometry.kernel_size[0] * b.geometry.kernel_size[1] for b in convolutions)
    taps_after = sum(
        -(-b.geometry.kernel_size[0] // b.tile) * -(-b.geometry.kernel_size[1] // b.tile) * b.tile**2
        for b in sources
        if b.weight is not None
    )
    edges = config.edge_count
    gains = len(convolutions) * edges if edges > 1 else 0
    after = before + out_channels * (taps_after - taps_before) + gains
    if config.mode == "shiftwise":
        after = shared_parameters(out_channels, max(largest), config)
    return Match(
        path=paths[0],
        aliases=tuple(paths[1:]),
        type_name=type(site).__name__,
        in_channels=in_channels,
        out_channels=out_channels,
        stride=stride_of(convolutions),
        branches=sources,
        parameters_before=before,
        parameters_after=after,
        edges=1 if config.mode == "shiftwise" else edges,
    )


def stride_of(convolutions: Sequence[LinearBranch]) -> Size:
    """Of convolutions that agree in it."""
    stride = convolutions[0].stride
    return (1, 1) if stride is None else stride


def channels_of(convolutions: Sequence[LinearBranch]) -> tuple[int, int]:
    """Channels of input and output, of convolutions that agree in them."""
    channels = convolutions[0].channels
    return (0, 0) if channels is None else channels
