"""The source of a drawn network: what somebody would have written in a file of their own."""

from __future__ import annotations

import itertools
from string import Template
from textwrap import indent

from tests.nasty.habit import HABITS, Habit
from tests.nasty.networks import Block, Convolution, Network

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
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _of(block: Block, place: str) -> list[Habit]:
    """The habits of a block that stand in this place; what may stand in a sum and in its parent stands in the sum."""
    held = [HABITS[name] for name in block.habits]
    if place == "parent":
        return [one for one in held if "parent" in one.places and not ("sum" in one.places and block.kind != "conv")]
    if place == "sum" and block.kind == "conv":
        return []
    return [one for one in held if place in one.places]


def _fill(text: str, **names: str) -> str:
    return Template(text).safe_substitute(**names)


def _class(name: str, base: str, init: list[str], *methods: str) -> str:
    body = []
    if init:
        arguments = "self" if base == "nn.Module" else "self, *args, **kwargs"
        given = arguments.removeprefix("self").removeprefix(", ")
        body.append(
            "\n".join(
                [f"def __init__({arguments}):", f"    super().__init__({given})", indent("\n".join(init), "    ")]
            )
        )
    body += [method for method in methods if method]
    return f"class {name}({base}):\n" + indent("\n\n".join(body) or "pass", "    ")


def _forward(before: list[str], core: list[str], after: list[str]) -> str:
    lines = "\n".join([*before, *core, *after, "return y"])
    return "def forward(self, x):\n" + indent(lines, "    ")


# ---- the site


def _classes(i: int, block: Block, channels: int) -> list[str]:
    classes = []
    for one in _of(block, "convolution"):
        classes.append(_class(f"Conv{i}", "nn.Conv2d", one.init.split("\n") if one.init else [], one.methods))
    if block.kind == "sum":
        classes.append(_sum(i, block, channels))
    if block.kind == "functional":
        classes.append(_functional(i, block, channels))
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


def _conv(c: Convolution, channels: int, multiplier: int, name: str = "nn.Conv2d") -> str:
    given = [str(channels), str(channels * multiplier), _short(c.kernel_size)]
    if c.stride != (1, 1):
        given.append(f"stride={_short(c.stride)}")
    given.append(f"padding={c.padding!r}" if isinstance(c.padding, str) else f"padding={_short(c.padding)}")
    if c.dilation != (1, 1):
        given.append(f"dilation={_short(c.dilation)}")
    given.append(f"groups={channels}")
    if not c.bias:
        given.append("bias=False")
    return f"{name}({', '.join(given)})"


def _short(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else str(pair)


def _norm(arguments: str, channels: int) -> str:
    return f"nn.BatchNorm2d({channels}{', ' + arguments if arguments else ''})"


def _inside(block: Block) -> str:
    """The large convolution as it is reached from within its site."""
    if block.kind == "functional":
        return "self"
    last = {"attributes": "self.conv0", "list": "self.parts[0]", "dict": "self.parts['p0']", "sequential": "self.part0"}
    nested = block.holder != "attributes" and block.norm is not None
    return last[block.holder] + ("[0]" if nested else "")


def _sum(i: int, block: Block, channels: int) -> str:
    large = f"Conv{i}" if _of(block, "convolution") else "nn.Conv2d"
    out = channels * block.multiplier
    summands: list[tuple[str | None, str | None]] = [
        (_conv(block.convolution, channels, block.multiplier, large), _some_norm(block.norm, out))
    ]
    for part in block.parts:
        conv = None if part.convolution is None else _conv(part.convolution, channels, block.multiplier)
        summands.append((conv, _some_norm(part.norm, out)))
    init, terms = _hold(summands, block.holder)
    habits = _of(block, "sum")
    names = {"conv": _inside(block), "site": "self"}
    core = []
    wrapped = [one for one in habits if one.term]
    last = len(terms) - 1
    for one, k in zip(wrapped, itertools.cycle([last, 0]), strict=False):
        core.append(_fill(one.term, term=terms[k], **names).replace("\nt = ", f"\nt{k} = "))
        core[-1] = _rename(core[-1], k)
        terms[k] = f"t{k}"
    method = ""
    if block.style == "method":
        method = _ADD_UP
    core += _add_up(terms, block.style)
    init += [_fill(one.init, **names) for one in habits if one.init]
    extra = [_fill(one.methods, **names) for one in habits if one.methods]
    large_only = f"def large(self, x):\n    return {_inside(block)}(x)"
    return _class(
        f"Site{i}",
        "nn.Module",
        init,
        large_only if "calls a method of the site" in block.habits else "",
        method,
        *extra,
        _forward(
            [_fill(one.before, **names) for one in habits if one.before],
            core,
            [_fill(one.after, **names) for one in habits if one.after],
        ),
    )


_ADD_UP = """
def add_up(self, *responses):
    y = responses[0]
    for one in responses[1:]:
        y = y + one
    return y
""".strip()


def _rename(lines: str, k: int) -> str:
    """The summand's name t becomes t<k>: several habits may have one each."""
    renamed = []
    for line in lines.split("\n"):
        stripped = line.lstrip()
        if stripped.startswith(("t = ", "t += ")):
            line = line[: len(line) - len(stripped)] + f"t{k}" + stripped[1:]
        renamed.append(line)
    return "\n".join(renamed)


def _some_norm(arguments: str | None, channels: int) -> str | None:
    return None if arguments is None else _norm(arguments, channels)


def _hold(summands: list[tuple[str | None, str | None]], holder: str) -> tuple[list[str], list[str]]:
    """Lines of ``__init__`` that keep the parts, and the expressions of the summands."""
    init, terms, made = [], [], []
    for k, (conv, norm) in enumerate(summands):
        if holder == "attributes":
            term = "x"
            for name, made_of in ((f"conv{k}", conv), (f"bn{k}", norm)):
                if made_of is not None:
                    init.append(f"self.{name} = {made_of}")
                    term = f"self.{name}({term})"
            terms.append(term)
            continue
        both = [one for one in (conv, norm) if one is not None]
        if not both:
            terms.append("x")
            continue
        whole = both[0] if len(both) == 1 else f"nn.Sequential({', '.join(both)})"
        where = {"list": f"self.parts[{len(made)}]", "dict": f"self.parts['p{k}']", "sequential": f"self.part{k}"}[
            holder
        ]
        made.append((k, whole))
        terms.append(f"{where}(x)")
    if holder == "list":
        init.append("self.parts = nn.ModuleList([" + ", ".join(whole for _, whole in made) + "])")
    elif holder == "dict":
        init.append("self.parts = nn.ModuleDict({" + ", ".join(f"'p{k}': {whole}" for k, whole in made) + "})")
    elif holder == "sequential":
        init += [f"self.part{k} = {whole}" for k, whole in made]
    return init, terms


def _add_up(terms: list[str], style: str) -> list[str]:
    first, *others = terms
    if style == "reversed":
        return [f"y = {' + '.join(reversed(terms))}"]
    if style == "sum()":
        return [f"y = sum([{', '.join(terms)}])"]
    if style == "stack":
        return [f"y = torch.stack([{', '.join(terms)}]).sum(0)"]
    if style == "iadd":
        return [f"y = {first}", *(f"y += {one}" for one in others)]
    if style == "add_":
        return [f"y = {first}", *(f"y = y.add_({one})" for one in others)]
    if style == "torch.add":
        return [f"y = {first}", *(f"y = torch.add(y, {one})" for one in others)]
    if style == "loop":
        return ["y = None", f"for one in ({', '.join(terms)},):", "    y = one if y is None else y + one"]
    if style == "from zero":
        return ["y = 0", f"for one in ({', '.join(terms)},):", "    y = y + one"]
    if style == "method":
        return [f"y = self.add_up({', '.join(terms)})"]
    return [f"y = {' + '.join(terms)}"]


def _functional(i: int, block: Block, channels: int) -> str:
    c, out = block.convolution, channels * block.multiplier
    init = [f"self.weight = nn.Parameter(torch.zeros({out}, 1, {c.kernel_size[0]}, {c.kernel_size[1]}))"]
    init.append(f"self.bias = nn.Parameter(torch.zeros({out}))" if c.bias else "self.bias = None")
    habits = _of(block, "sum")
    padding = repr(c.padding) if isinstance(c.padding, str) else _short(c.padding)
    rest = f"{_short(c.stride)}, {padding}, {_short(c.dilation)}, {channels}"
    names = {"conv": "self", "site": "self", "rest": rest}
    term = f"F.conv2d(x, self.weight, self.bias, {rest})"
    core = []
    for one in habits:
        if one.term:
            core.append(_rename(_fill(one.term, term=term, **names), 0))
            term = "t0"
    core.append(f"y = {term}")
    init += [_fill(one.init, **names) for one in habits if one.init]
    extra = [_fill(one.methods, **names) for one in habits if one.methods]
    return _class(
        f"Site{i}",
        "nn.Module",
        init,
        *extra,
        _forward(
            [_fill(one.before, **names) for one in habits if one.before],
            core,
            [_fill(one.after, **names) for one in habits if one.after],
        ),
    )


# ---- who calls it


def _parent(i: int, block: Block, channels: int) -> str:
    large = f"Conv{i}" if _of(block, "convolution") else "nn.Conv2d"
    made = f"Site{i}()" if block.kind != "conv" else _conv(block.convolution, channels, block.multiplier, large)
    init, site = {
        "": (f"self.site = {made}", "self.site"),
        "sequential": (f"self.site = nn.Sequential({made})", "self.site[0]"),
        "list": (f"self.site = nn.ModuleList([{made}])", "self.site[0]"),
        "dict": (f"self.site = nn.ModuleDict({{'one': {made}}})", "self.site['one']"),
        "opaque": (f"self.site = Opaque({made})", "self.site.inner"),
    }[block.wrapper]
    conv = site if block.kind != "sum" else site + _inside(block).removeprefix("self")
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
    habits = _of(block, "parent")
    arguments = next((HABITS[name].arguments for name in block.habits if HABITS[name].arguments != "x"), "x")
    lines += [_fill(one.init, **names) for one in habits if one.init]
    return _class(
        f"Block{i}",
        "nn.Module",
        lines,
        *[_fill(one.methods, **names) for one in habits if one.methods],
        _forward(
            [_fill(one.before, **names) for one in habits if one.before],
            [f"y = {called}({arguments})"],
            [*(_fill(one.after, **names) for one in habits if one.after), *tail],
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
    inside = _inside(block).replace("['", ".").replace("']", "").replace("[", ".").replace("]", "").removeprefix("self")
    return site_path(i, block) + (inside if block.kind == "sum" else "")


def _net(network: Network) -> str:
    init = ["self.blocks = nn.Sequential(" + ", ".join(f"Block{i}()" for i in range(len(network.blocks))) + ")"]
    core = ["y = self.blocks(x)"]
    if network.head:
        init.append(f"self.head = nn.Linear({network.channels}, 3)")
        core.append("y = {'map': y, 'logits': self.head(y.mean((-2, -1)))}")
    return _class("Net", "nn.Module", init, _forward([], core, []))


def _statements(function: str, place: str, network: Network) -> str:
    lines = []
    for i, block in enumerate(network.blocks):
        for name in block.habits:
            one = HABITS[name]
            if place in one.places:
                lines += [
                    f"block = net.blocks[{i}]",
                    f"site = net.get_submodule({site_path(i, block)!r})",
                    f"conv = net.get_submodule({convolution_path(i, block)!r})",
                    one.statements,
                ]
    return f"def {function}(net):\n" + indent("\n".join([*lines, "return net"]), "    ")
