"""Mode "shiftwise": which layers the paper's module can take the place of, and how large it will be."""

from __future__ import annotations

from torch import nn

from sw_transplant.config import SWConfig
from sw_transplant.find.match import Match
from sw_transplant.layers.folding import keeps_statistics
from sw_transplant.layers.orders import ghost_channels

DEFAULT_TILE = 3
"""Side of the tiles where the config names none: that of the paper's models."""


def shared_tile(config: SWConfig) -> int:
    """Side of the tiles of the paper's module."""
    return config.tile or DEFAULT_TILE


def active_count(channels: int, config: SWConfig) -> int:
    """How many of so many channels do not bypass the module."""
    return channels - len(ghost_channels(channels, config.ghost, config.seed))


def shared_parameters(channels: int, length: int, config: SWConfig) -> int:
    """Number of parameters of the paper's module for strips of this length: the banks and three BatchNorms."""
    tile = shared_tile(config)
    return active_count(channels, config) * (config.paths * -(-length // tile) * tile * tile + 6)


def reason_against_sharing(match: Match, site: nn.Module, config: SWConfig) -> str | None:
    """Why, in mode ``"shiftwise"``, the paper's module cannot take the place of this layer; None if it can."""
    if match.in_channels != match.out_channels:
        return f"mode 'shiftwise' keeps the number of channels; here it is {match.in_channels} -> {match.out_channels}"
    for branch in match.branches:
        geometry = branch.geometry
        centred = geometry.padding != "same" and all(
            geometry.padding[2 * axis] == geometry.dilation[axis] * (geometry.kernel_size[axis] // 2)
            for axis in range(2)
        )
        if not centred or geometry.growth != (0, 0):
            return "mode 'shiftwise' keeps the size of the map; here kernel or padding are even, uneven or missing"
        if branch.bn is not None and not keeps_statistics(site.get_submodule(branch.bn)):
            return f"mode 'shiftwise' folds BatchNorms, and {branch.bn} has no running statistics"
    if not active_count(match.out_channels, config):
        return f"ghost {config.ghost} leaves none of its {match.out_channels} channels; lower it"
    return None
