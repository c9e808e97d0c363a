"""Whether the weights of a folder have the sizes that its description gives them: asked before anything is built.

A description may say anything, and a module of a damaged number of tiles could take all memory there is. Weights are
no larger than their file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sw_transplant.equivalence import grid_placements
from sw_transplant.find.match import Match, join_path
from sw_transplant.find.rules import conv_geometry
from sw_transplant.layers.orders import BRANCHES, check_order
from sw_transplant.surgery.approximate import SharedSpec
from sw_transplant.surgery.description import LayerDescription


def check_sizes(layers: Sequence[LayerDescription], weights: Mapping[str, Tensor], place: Any) -> None:
    """Compares the descriptions of layers with the weights beside them.

    Args:
        layers: what is to be built.
        weights: all of the folder.
        place: of the folder, for the message.

    Raises:
        ValueError: weights are missing or of other sizes, or orders name channels or places that do not exist.
    """
    for layer in layers:
        expected = _laid_out(layer.match) if layer.shared is None else _shared(layer.match, layer.shared)
        for name, shape in expected.items():
            full = join_path(layer.match.path, name)
            there = weights.get(full)
            if there is None or tuple(there.shape) != shape:
                found = "is missing" if there is None else f"has shape {tuple(there.shape)}"
                raise ValueError(
                    f"{place}: does not fit: {full} {found}, and the description of the layer says {shape}; one of the "
                    f"two files is damaged, or not from the same model"
                )
        if layer.shared is None:
            _check_placements(layer.match, weights, place)
        else:
            _check_orders(layer.match, layer.shared, weights, place)


def _check_placements(match: Match, weights: Mapping[str, Tensor], place: Any) -> None:
    for i, branch in enumerate(match.branches):
        name = join_path(match.path, f"branches.{i}.placements")
        if branch.weight is None or match.edges > 1 or name not in weights:
            continue
        expected = grid_placements(branch.geometry.kernel_size, branch.tile)[None]
        if not torch.equal(weights[name].cpu(), expected):
            raise ValueError(f"{place}: {name} does not put the tiles side by side; one of the two files is damaged")


def _check_orders(match: Match, spec: SharedSpec, weights: Mapping[str, Tensor], place: Any) -> None:
    active = weights.get(join_path(match.path, "active"))
    if active is not None:
        expected = [channel for channel in range(match.out_channels) if channel not in spec.ghosts]
        if active.tolist() != expected:
            raise ValueError(
                f"{place}: {join_path(match.path, 'active')} is not the channels that the description of the layer "
                f"leaves; one of the two files is damaged"
            )
    count, tiles = match.out_channels - len(spec.ghosts), -(-spec.kernel_size // spec.tile)
    for branch in BRANCHES:
        shape = (spec.edges, count) if branch == "identity" else (spec.edges, count, tiles)
        name = join_path(match.path, branch)
        if name in weights:
            check_order(f"{place}: {name}", weights[name], torch.Size(shape), tiles)


def check_site(site: nn.Module, match: Match) -> None:
    """Whether a plain convolution is the one that was replaced; sums are checked by their parts' names and shapes.

    Raises:
        ValueError: it has another stride, padding or dilation.
    """
    if type(site) is not nn.Conv2d or len(match.branches) != 1:
        return
    geometry, described = conv_geometry(site), match.branches[0].geometry
    if geometry != described or tuple(site.stride) != match.stride or site.out_channels != match.out_channels:
        raise ValueError(
            f"{match.path or 'model'}: {geometry} with stride {tuple(site.stride)} and {site.out_channels} channels in "
            f"the model, {described} with stride {match.stride} and {match.out_channels} channels in the folder; is it "
            f"another model?"
        )


def _laid_out(match: Match) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i, branch in enumerate(match.branches):
        if branch.weight is None:
            continue
        (kh, kw), n = branch.geometry.kernel_size, branch.tile
        shapes[f"branches.{i}.bank"] = (match.out_channels, -(-kh // n) * -(-kw // n), n, n)
        if match.edges > 1:
            shapes[f"branches.{i}.gain"] = (match.edges,)
    return shapes


def _shared(match: Match, spec: SharedSpec) -> dict[str, tuple[int, ...]]:
    active, tiles = match.out_channels - len(spec.ghosts), -(-spec.kernel_size // spec.tile)
    shapes: dict[str, tuple[int, ...]] = {"active": (active,)} if spec.ghosts else {}
    shapes["horizontal"] = (spec.edges, active, tiles)
    last = f"paths.{spec.paths - 1}.weight"
    return {**shapes, last: (active * tiles, 1, spec.tile, spec.tile)}
