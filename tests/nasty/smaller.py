"""Smaller networks: what is left of one when something is left out, and those that have one habit only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tests.nasty.habit import BOTH, HABITS, reachable
from tests.nasty.networks import Block, Convolution, Network, Part

_SEVEN = Convolution((7, 7), (3, 3))
_THREE = Part(Convolution((3, 3), (1, 1)))

SIMPLE_BLOCKS = (
    Block("conv", _SEVEN, None, 1, (), "plus", "attributes", "", ""),
    Block("sum", _SEVEN, None, 1, (_THREE,), "plus", "attributes", "", ""),
    Block("sum", _SEVEN, "", 1, (_THREE,), "plus", "attributes", "", "relu"),
    Block("functional", _SEVEN, None, 1, (), "plus", "attributes", "", ""),
)
"""A 7x7 convolution alone, beside a 3x3, the same with a BatchNorm, and as a call of F.conv2d."""


def simpler(network: Network) -> Iterator[Network]:
    """Networks that are this one with something left out, the largest steps first."""
    held = [(None, name) for name in network.habits]
    held += [(i, name) for i, block in enumerate(network.blocks) for name in block.habits]
    if len(held) + len(network.blocks) > 1:
        for i, name in held:
            yield from _bare(network, i, name)
    if len(network.blocks) > 1:
        for i in range(len(network.blocks)):
            yield replace(network, blocks=(*network.blocks[:i], *network.blocks[i + 1 :]))
    for name in network.habits:
        yield replace(network, habits=tuple(other for other in network.habits if other != name))
    if network.head:
        yield replace(network, head=False)
    for i, block in enumerate(network.blocks):
        for other in _simpler_blocks(block):
            if all(HABITS[name].needs(other) for name in other.habits):
                yield replace(network, blocks=(*network.blocks[:i], other, *network.blocks[i + 1 :]))


def _bare(network: Network, i: int | None, name: str) -> Iterator[Network]:
    """Networks of one simple block with this habit only, that of block i, or of the world where i is None."""
    simple = replace(network, habits=(), head=False)
    yield from (replace(one, seed=network.seed, channels=network.channels) for one in alone(name))
    if i is not None:
        yield replace(simple, blocks=(replace(network.blocks[i], habits=(name,)),))


def alone(name: str) -> Iterator[Network]:
    """The networks that have this habit and no other, in each place of each simple block that it fits."""
    one = HABITS[name]
    for block in SIMPLE_BLOCKS:
        if "world" in one.places:
            yield Network(0, 4, (block,), False, (name,))
            continue
        places = {"convolution": reachable(block), "sum": block.kind != "conv"}
        if any(places.get(place, True) for place in one.places) and one.needs(block):
            yield Network(0, 4, (replace(block, habits=(name,)),), False)
        if set(BOTH) <= set(one.places) and block.kind != "conv" and one.needs(block):
            yield Network(0, 4, (replace(block, habits=(name,), above=(name,)),), False)


def _simpler_blocks(block: Block) -> Iterator[Block]:
    for name in block.habits:
        yield replace(block, habits=tuple(other for other in block.habits if other != name))
    for k in range(len(block.parts)):
        yield replace(block, parts=(*block.parts[:k], *block.parts[k + 1 :]))
    simple = SIMPLE_BLOCKS[0]
    for name in ("convolution", "norm", "multiplier", "style", "holder", "wrapper", "tail"):
        if getattr(block, name) == getattr(simple, name) or (name == "convolution" and block.parts):
            continue
        mixed = name == "multiplier" and block.tail == "mix"
        yield replace(block, **{name: getattr(simple, name)}, **({"tail": ""} if mixed else {}))
    for k, part in enumerate(block.parts):
        if part.norm is not None:
            yield replace(block, parts=(*block.parts[:k], replace(part, norm=None), *block.parts[k + 1 :]))
