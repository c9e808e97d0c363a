"""From a seed to the description of a network: blocks, habits, and the world it lives in. Nothing is built here."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tests.nasty.habit import HABITS, Habit, Place
from tests.nasty.habits import (  # noqa: F401  they fill the table
    afterwards,
    convolution_effects,
    convolution_functions,
    decisions,
    effects,
    instances,
    moods,
    parameters,
    parents,
    worlds,
)

Pair = tuple[int, int]


@dataclass(frozen=True)
class Convolution:
    """The arguments of a depthwise nn.Conv2d."""

    kernel_size: Pair
    padding: Pair | str
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    bias: bool = True

    @property
    def grows(self) -> Pair | None:
        """By how much a map grows at stride 1; None where padding is a word."""
        if isinstance(self.padding, str):
            return (0, 0) if self.padding == "same" else _minus(self.kernel_size, self.dilation)
        low = _minus(self.kernel_size, self.dilation)
        return (low[0] + 2 * self.padding[0], low[1] + 2 * self.padding[1])


def _minus(kernel: Pair, dilation: Pair) -> Pair:
    return (-(kernel[0] - 1) * dilation[0], -(kernel[1] - 1) * dilation[1])


@dataclass(frozen=True)
class Part:
    """A summand: a convolution, or None for the identity, and the arguments of the BatchNorm that follows, or None."""

    convolution: Convolution | None
    norm: str | None = None


@dataclass(frozen=True)
class Block:
    """A site and the module that calls it.

    Attributes:
        kind: "conv": the site is one convolution; "sum": a module that adds up several; "functional": a module that
            holds parameters and calls F.conv2d.
        convolution: the large one.
        norm: arguments of the BatchNorm that follows it, or None.
        multiplier: output channels per input channel.
        parts: what a sum adds to it.
        style: how a sum adds up.
        holder: where the parts are kept: "attributes", "list", "dict", "sequential".
        wrapper: what stands between the parent and the site.
        tail: what the parent does to the site's output.
        habits: names, each in a place that this block has.
        above: those of them that the parent has, where the site could have them, too.
    """

    kind: str
    convolution: Convolution
    norm: str | None
    multiplier: int
    parts: tuple[Part, ...]
    style: str
    holder: str
    wrapper: str
    tail: str
    habits: tuple[str, ...] = ()
    above: tuple[str, ...] = ()

    @property
    def keeps_shape(self) -> bool:
        """Whether input and output have one shape, at every size."""
        return self.multiplier == 1 and self.convolution.stride == (1, 1) and self.convolution.grows == (0, 0)

    @property
    def plain(self) -> bool:
        """Whether the large convolution is an nn.Conv2d and no subclass."""
        return not any("convolution" in HABITS[name].places for name in self.habits)


@dataclass(frozen=True)
class World:
    """What is done to a network, and with what."""

    dtype: str = "float64"
    sizes: tuple[Pair, Pair] = ((12, 13), (9, 16))
    batch: int | None = 2
    layout: str = "contiguous"
    around: str = ""
    inplace: bool = False
    training: bool = False
    transport: str = ""
    form: str = "auto"
    tile: int | None = None
    edges: int | None = None
    min_kernel: int = 7
    autocast: bool = False


@dataclass(frozen=True)
class Network:
    """A drawn network."""

    seed: int
    channels: int
    blocks: tuple[Block, ...]
    head: bool
    habits: tuple[str, ...] = field(default=())

    @property
    def world(self) -> World:
        options: dict[str, Any] = {}
        for name in self.habits:
            options |= HABITS[name].options
        return World(**options)

    @property
    def all_habits(self) -> tuple[Habit, ...]:
        """Every habit of the network once."""
        held = [*self.habits, *(name for block in self.blocks for name in block.habits)]
        return tuple(HABITS[name] for name in dict.fromkeys(held))

    @property
    def isolated(self) -> bool:
        return any(one.isolated for one in self.all_habits)


def draw(seed: int) -> Network:
    """The network of a seed; the same one wherever and whenever it is drawn, as long as the tables are the same."""
    dice = random.Random(seed)
    blocks = tuple(_block(dice) for _ in range(dice.choice((1, 1, 1, 2, 2, 3))))
    network = Network(seed, dice.choice((1, 2, 2, 3, 3, 4, 4, 4, 4, 6, 6, 6)), blocks, dice.random() < 0.3)
    for _ in range(dice.choice((0, 1, 1, 2, 2, 3, 4, 6))):
        network = _with_a_habit(network, dice)
    return network


_PLACES: tuple[Place, ...] = (*(("convolution", "sum", "parent", "built") * 3), "world", "world", "later")


def _with_a_habit(network: Network, dice: random.Random) -> Network:
    """One habit more, of those that fit; the same network where none does."""
    place = dice.choice(_PLACES)
    i = dice.randrange(len(network.blocks))
    fits = _fitting_world(network) if place == "world" else _fitting_block(network, place, network.blocks[i])
    names = [one.name for one in HABITS.values() if place in one.places and fits(one)]
    if not names:
        return network
    name = dice.choice(names)
    if place == "world":
        return replace(network, habits=(*network.habits, name))
    block = network.blocks[i]
    above = (*block.above, name) if place == "parent" else block.above
    changed = replace(block, habits=(*block.habits, name), above=above)
    return replace(network, blocks=(*network.blocks[:i], changed, *network.blocks[i + 1 :]))


def _fitting_world(network: Network) -> Callable[[Habit], bool]:
    """Whether a habit of the world can be added to those that a network has."""
    held = network.all_habits
    taken = {option for one in held for option in one.options}
    taken |= {"dtype", "autocast"} if any(one.rough for one in held) else set()
    return lambda one: not taken & set(one.options)


def _fitting_block(network: Network, place: Place, block: Block) -> Callable[[Habit], bool]:
    """Whether a habit can be added in this place of a block."""
    held, low = {one.name for one in network.all_habits}, network.world.dtype != "float64"
    open_ = {"convolution": block.plain and block.kind != "functional", "sum": block.kind != "conv"}.get(place, True)
    return lambda one: open_ and one.name not in held and one.needs(block) and not (low and one.rough)


# ---- blocks


_KERNELS = (
    (7, 7),
    (7, 7),
    (9, 9),
    (11, 11),
    (13, 13),
    (13, 5),
    (3, 11),
    (31, 5),
    (8, 8),
    (7, 10),
    (1, 9),
    (21, 21),
    (5, 31),
)
_NORMS = (
    "",
    "",
    "",
    "affine=False",
    "momentum=None",
    "track_running_stats=False",
    "eps=0.1",
    "momentum=1.0",
)
STYLES = ("plus", "plus", "reversed", "sum()", "stack", "iadd", "torch.add", "loop", "from zero", "method", "add_")
_TAILS = ("", "", "relu", "norm", "residual", "mix", "norm and residual", "relu in place", "module relu in place")


def _block(dice: random.Random) -> Block:
    kind = dice.choice(("conv", "conv", "sum", "sum", "sum", "functional", "functional"))
    kernel = dice.choice(_KERNELS)
    dilation = dice.choice(((1, 1),) * 7 + ((2, 2), (2, 1), (9, 9)))
    stride = dice.choice(((1, 1),) * 6 + ((2, 2), (2, 1), (3, 3)))
    padding = _padding(dice, kernel, dilation, stride)
    convolution = Convolution(kernel, padding, stride, dilation, dice.random() < 0.6)
    multiplier = dice.choice((1, 1, 1, 1, 2))
    parts = ()
    if kind == "sum":
        parts = tuple(_part(dice, convolution, multiplier) for _ in range(dice.choice((0, 1, 1, 2, 2, 3))))
    norm = dice.choice(_NORMS) if kind == "sum" and dice.random() < 0.5 else None
    block = Block(
        kind,
        convolution,
        norm,
        multiplier,
        parts,
        dice.choice(STYLES),
        dice.choice(("attributes", "attributes", "attributes", "list", "dict", "sequential")),
        dice.choice(("",) * 6 + ("sequential", "list", "dict", "opaque")),
        "",
    )
    tail = dice.choice(_TAILS)
    if not block.keeps_shape and "residual" in tail:
        tail = "relu"
    return replace(block, tail="mix" if multiplier > 1 else tail)


def _padding(dice: random.Random, kernel: Pair, dilation: Pair, stride: Pair) -> Pair | str:
    centred = (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)
    words = ("same", "same") if stride == (1, 1) else ()
    words += ("valid",) if max(kernel) < 10 and max(dilation) == 1 else ()
    other = ((kernel[0] // 2, kernel[1] // 2), (kernel[0], 0)) if max(kernel) < 12 and max(dilation) == 1 else ()
    return dice.choice((centred,) * 5 + words + other)


def _part(dice: random.Random, large: Convolution, multiplier: int) -> Part:
    """A summand whose output has the size of the large convolution's."""
    norm = dice.choice(_NORMS) if dice.random() < 0.5 else None
    centred = large.grows == (0, 0)
    if centred and large.stride == (1, 1) and multiplier == 1 and dice.random() < 0.25:
        return Part(None, norm)
    bias = dice.random() < 0.5
    if centred and dice.random() < 0.8:
        kernel = dice.choice(((3, 3), (5, 5), (1, 1), (5, 13), (7, 7), (3, 1)))
        dilation = dice.choice(((1, 1), (1, 1), (1, 1), (2, 2), (3, 3)))
        sides = (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)
        same = large.stride == (1, 1) and dice.random() < 0.15
        return Part(Convolution(kernel, "same" if same else sides, large.stride, dilation, bias), norm)
    return Part(replace(large, bias=bias), norm)
