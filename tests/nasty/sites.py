"""The source of sites: classes that add up convolutions, or that call F.conv2d by themselves."""

from __future__ import annotations

import itertools
from string import Template
from textwrap import indent

from tests.nasty.habit import HABITS, Habit
from tests.nasty.networks import Block, Convolution


def habits_of(block: Block, place: str) -> list[Habit]:
    """The habits of a block that stand in this place; what may stand in a sum stands there, unless it is above."""
    held = [HABITS[name] for name in block.habits if place in HABITS[name].places]
    if place not in ("sum", "parent"):
        return held
    inside = {one.name for one in held if "sum" in one.places and block.kind != "conv" and one.name not in block.above}
    return [one for one in held if (one.name in inside) == (place == "sum")]


def fill(text: str, **names: str) -> str:
    return Template(text).safe_substitute(**names)


def class_source(name: str, base: str, init: list[str], *methods: str) -> str:
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


def forward_source(before: list[str], core: list[str], after: list[str]) -> str:
    lines = "\n".join([*before, *core, *after, "return y"])
    return "def forward(self, x):\n" + indent(lines, "    ")


def convolution_source(c: Convolution, channels: int, multiplier: int, name: str = "nn.Conv2d") -> str:
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


def inside(block: Block) -> str:
    """The large convolution as it is reached from within its site."""
    if block.kind == "functional":
        return "self"
    last = {"attributes": "self.conv0", "list": "self.parts[0]", "dict": "self.parts['p0']", "sequential": "self.part0"}
    nested = block.holder != "attributes" and block.norm is not None
    return last[block.holder] + ("[0]" if nested else "")


def sum_source(i: int, block: Block, channels: int) -> str:
    large = f"Conv{i}" if habits_of(block, "convolution") else "nn.Conv2d"
    out = channels * block.multiplier
    summands: list[tuple[str | None, str | None]] = [
        (convolution_source(block.convolution, channels, block.multiplier, large), _some_norm(block.norm, out))
    ]
    for part in block.parts:
        conv = None if part.convolution is None else convolution_source(part.convolution, channels, block.multiplier)
        summands.append((conv, _some_norm(part.norm, out)))
    init, terms = _hold(summands, block.holder)
    habits = habits_of(block, "sum")
    names = {"conv": inside(block), "site": "self"}
    core = []
    wrapped = [one for one in habits if one.term]
    last = len(terms) - 1
    for one, k in zip(wrapped, itertools.cycle([last, 0]), strict=False):
        core.append(fill(one.term, term=terms[k], **names).replace("\nt = ", f"\nt{k} = "))
        core[-1] = _rename(core[-1], k)
        terms[k] = f"t{k}"
    method = ""
    if block.style == "method":
        method = _ADD_UP
    core += _add_up(terms, block.style)
    init += [fill(one.init, **names) for one in habits if one.init]
    extra = [fill(one.methods, **names) for one in habits if one.methods]
    large_only = f"def large(self, x):\n    return {inside(block)}(x)"
    return class_source(
        f"Site{i}",
        "nn.Module",
        init,
        large_only if "calls a method of the site" in block.habits else "",
        method,
        *extra,
        forward_source(
            [fill(one.before, **names) for one in habits if one.before],
            core,
            [fill(one.after, **names) for one in habits if one.after],
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


def functional_source(i: int, block: Block, channels: int) -> str:
    c, out = block.convolution, channels * block.multiplier
    init = [f"self.weight = nn.Parameter(torch.zeros({out}, 1, {c.kernel_size[0]}, {c.kernel_size[1]}))"]
    init.append(f"self.bias = nn.Parameter(torch.zeros({out}))" if c.bias else "self.bias = None")
    habits = habits_of(block, "sum")
    padding = repr(c.padding) if isinstance(c.padding, str) else _short(c.padding)
    rest = f"{_short(c.stride)}, {padding}, {_short(c.dilation)}, {channels}"
    names = {"conv": "self", "site": "self", "rest": rest}
    term = f"F.conv2d(x, self.weight, self.bias, {rest})"
    core = []
    for one in habits:
        if one.term:
            core.append(_rename(fill(one.term, term=term, **names), 0))
            term = "t0"
    core.append(f"y = {term}")
    init += [fill(one.init, **names) for one in habits if one.init]
    extra = [fill(one.methods, **names) for one in habits if one.methods]
    return class_source(
        f"Site{i}",
        "nn.Module",
        init,
        *extra,
        forward_source(
            [fill(one.before, **names) for one in habits if one.before],
            core,
            [fill(one.after, **names) for one in habits if one.after],
        ),
    )
