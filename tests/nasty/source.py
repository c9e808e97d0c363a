"""The source of a drawn network: what somebody would have written in a file of their own."""

from __future__ import annotations

import re
from textwrap import indent

from tests.nasty.habit import HABITS
from tests.nasty.networks import Block, Network
from tests.nasty.sites import (
    class_source,
    convolution_source,
    fill,
    forward_source,
    functional_source,
    habits_of,
    inside,
    sum_source,
)

_TOP = '''\
"""Network {seed}. Habits: {habits}."""
import functools
import math
import pickle
import random
import types

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import utils
from torch.utils.checkpoint import checkpoint
'''


def source(network: Network) -> str:
    """The file: classes Conv<i>, Site<i>, Block<i> for every block, Net, and functions ``build`` and ``later``."""
    names = ", ".join(one.name for one in network.all_habits) or "none"
    parts = [_TOP.format(seed=network.seed, habits=names)]
    parts += dict.fromkeys(one.header for one in network.all_habits if one.header)
    for i, block in enumerate(network.blocks):
        parts += _classes(i, block, network.channels)
    parts.append(_net(network))
    parts.append(_statements("build", "built", network))
    parts.append(_statements("later", "later", network))
    return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"


def _classes(i: int, block: Block, channels: int) -> list[str]:
    classes = []
    for one in habits_of(block, "convolution"):
        classes.append(class_source(f"Conv{i}", "nn.Conv2d", one.init.split("\n") if one.init else [], one.methods))
    if block.kind == "sum":
        classes.append(sum_source(i, block, channels))
    if block.kind == "functional":
        classes.append(functional_source(i, block, channels))
    if block.wrapper == "opaque":
        classes.append(_OPAQUE)
    return [*classes, _parent(i, block, channels)]


_OPAQUE = """
class Opaque(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor) and args[0].dim() > 9:
            raise ValueError
        return self.inner(*args, **kwargs)
"""


def _parent(i: int, block: Block, channels: int) -> str:
    large = f"Conv{i}" if habits_of(block, "convolution") else "nn.Conv2d"
    plain = convolution_source(block.convolution, channels, block.multiplier, large)
    made = plain if block.kind == "conv" else f"Site{i}()"
    init, site = {
        "": (f"self.site = {made}", "self.site"),
        "sequential": (f"self.site = nn.Sequential({made})", "self.site[0]"),
        "list": (f"self.site = nn.ModuleList([{made}])", "self.site[0]"),
        "dict": (f"self.site = nn.ModuleDict({{'one': {made}}})", "self.site['one']"),
        "opaque": (f"self.site = Opaque({made})", "self.site.inner"),
    }[block.wrapper]
    conv = site if block.kind != "sum" else site + inside(block).removeprefix("self")
    called = "self.site" if block.wrapper in ("", "sequential", "opaque") else site
    names = {"conv": conv, "site": called if block.wrapper != "sequential" else site}
    out = channels * block.multiplier
    lines = [init]
    tail = []
    if "norm" in block.tail:
        lines.append(f"self.norm = nn.BatchNorm2d({out})")
        tail.append("y = self.norm(y)")
    if "residual" in block.tail:
        tail.append("y = y + x")
    if block.tail == "relu":
        tail.append("y = F.relu(y)")
    if block.tail == "relu in place":
        tail.append("y = F.relu(y, inplace=True)")
    if block.tail == "module relu in place":
        lines.append("self.act = nn.ReLU(inplace=True)")
        tail.append("y = self.act(y)")
    if block.tail == "mix":
        lines.append(f"self.mix = nn.Conv2d({out}, {channels}, 1)")
        tail.append("y = self.mix(y)")
    habits = habits_of(block, "parent")
    arguments = next((HABITS[name].arguments for name in block.habits if HABITS[name].arguments != "x"), "x")
    lines += [fill(one.init, **names) for one in habits if one.init]
    return class_source(
        f"Block{i}",
        "nn.Module",
        lines,
        *[fill(one.methods, **names) for one in habits if one.methods],
        forward_source(
            [fill(one.before, **names) for one in habits if one.before],
            [f"y = {called}({arguments})"],
            [*(fill(one.after, **names) for one in habits if one.after), *tail],
        ),
    )


def site_path(i: int, block: Block) -> str:
    """Where the site of a block stands in the network."""
    return (
        f"blocks.{i}.site"
        + {"": "", "sequential": ".0", "list": ".0", "dict": ".one", "opaque": ".inner"}[block.wrapper]
    )


def convolution_path(i: int, block: Block) -> str:
    """Where the large convolution of a block stands in the network; of a functional one, its site."""
    if block.kind != "sum":
        return site_path(i, block)
    return site_path(i, block) + re.sub(r"\['?(\w+)'?\]", r".\1", inside(block).removeprefix("self"))


def _net(network: Network) -> str:
    init = ["self.blocks = nn.Sequential(" + ", ".join(f"Block{i}()" for i in range(len(network.blocks))) + ")"]
    core = ["y = self.blocks(x)"]
    if network.head:
        init.append(f"self.head = nn.Linear({network.channels}, 3)")
        core.append("y = {'map': y, 'logits': self.head(y.mean((-2, -1)))}")
    return class_source("Net", "nn.Module", init, forward_source([], core, []))


def _statements(function: str, place: str, network: Network) -> str:
    lines = []
    for i, block in enumerate(network.blocks):
        for name in block.habits:
            one = HABITS[name]
            if place not in one.places:
                continue
            paths = {"block": f"blocks.{i}", "site": site_path(i, block), "conv": convolution_path(i, block)}
            for known, path in paths.items():
                if re.search(rf"\b{known}\b", one.statements):
                    lines.append(f"{known} = net.get_submodule({path!r})")
            lines.append(one.statements)
    return f"def {function}(net):\n" + indent("\n".join([*lines, "return net"]), "    ")
