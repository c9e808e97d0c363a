"""The public names, each with its signature, as text that is the same for every Python and on every machine.

    python -m tests.api            says how the package differs from api.json
    python -m tests.api --write    writes api.json, for changes that are meant

What Python makes of annotations, dataclasses and the like differs from version to version. So all but the values of
defaults is read from the source.
"""

from __future__ import annotations

import ast
import copy
import enum
import functools
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

LOCK = Path(__file__).with_name("api.json")
COMMAND = "python -m tests.api --write"
ROOMS = [
    "sw_transplant",
    "sw_transplant.check",
    "sw_transplant.hf",
    "sw_transplant.layers",
    "sw_transplant.models",
    "sw_transplant.report",
    "sw_transplant.science",
    "sw_transplant.sparsity",
    "sw_transplant.surgery.calibration",
    "sw_transplant.surgery.distill",
]


def public_names() -> dict[str, str]:
    """Everything in ``__all__`` of the package and of its public rooms: dotted name to description."""
    described: dict[str, str] = {}
    homes: dict[int, str] = {}  # the name under which a thing is described, by its id
    classes: list[type] = []
    for room in ROOMS:
        names = import_module(room).__all__
        if len(set(names)) < len(names):
            raise ValueError(f"{room}.__all__ has a name twice: {sorted(names)}")
        for name in names:
            value, full = getattr(import_module(room), name), f"{room}.{name}"
            if id(value) in homes:
                described[full] = f"is {homes[id(value)]}"
            else:
                described |= describe(full, value, classes)
                homes[id(value)] = full
                classes += [value] if inspect.isclass(value) else []
    return dict(sorted(described.items()))


def describe(name: str, value: Any, public: Sequence[type] = ()) -> dict[str, str]:
    """A function, a constant, or a class with its members.

    Args:
        public: classes that are described already; what one inherits from them is not told again.
    """
    if inspect.isclass(value):
        told = {f"{name}.{member}": text for member, text in members(value, public).items()}
        return {name: heading(value, public)} | told
    if callable(value):
        return {name: signature(value)}
    if isinstance(value, dict):
        return {name: f"{type(value).__name__} of {', '.join(map(shown, value))}"}
    return {name: f"{type(value).__name__} = {shown(value)}"}


def shown(value: Any) -> str:
    """A value as text; of functions and classes the name, since they move between modules and have addresses."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    text = value.__name__ if inspect.isclass(value) or inspect.isroutine(value) else repr(value)
    if " at 0x" in text:
        raise ValueError(f"{text} has another text in every run; a public default needs a repr of its own")
    return text


@functools.cache
def source(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text(encoding="utf-8"))


def definition(thing: Any) -> Any:
    """The syntax tree of a function or class, found by its name in the file of its module."""
    node: Any = source(str(sys.modules[thing.__module__].__file__))
    for name in thing.__qualname__.split("."):
        node = next((each for each in node.body if getattr(each, "name", None) == name), None)
        if node is None:
            raise ValueError(f"{thing.__module__}: {thing.__qualname__} is defined in a branch; move it out of there")
    return node


def signature(function: Callable[..., Any]) -> str:
    """As it stands in the source, but with the values of the defaults."""
    function = inspect.unwrap(function)
    node = definition(function)
    arguments, named = copy.deepcopy(node.args), function.__kwdefaults__ or {}
    arguments.defaults = [ast.Name(shown(value)) for value in function.__defaults__ or ()]
    arguments.kw_defaults = [ast.Name(shown(named[a.arg])) if a.arg in named else None for a in arguments.kwonlyargs]
    return f"({ast.unparse(arguments)}){returned(node)}"


def returned(node: Any) -> str:
    return f" -> {ast.unparse(node.returns)}" if node.returns else ""


def heading(cls: type, public: Sequence[type] = ()) -> str:
    """Decorators, what it is beside itself, and the fields of a dataclass or named tuple in the order of arguments.

    Base classes that users cannot name are left out: they come and go as files are cut.
    """
    node = definition(cls)
    decorators = "".join(f"@{ast.unparse(each)} " for each in node.decorator_list)
    bases = [base for base in cls.__mro__[1:-1] if base in public or package_of(base) != package_of(cls)]
    nearest = [base.__name__ for base in bases if not any(issubclass(b, base) for b in bases if b is not base)]
    fields = [each.target.id for each in node.body if isinstance(each, ast.AnnAssign)] if is_record(cls) else []
    return f"{decorators}class({', '.join(nearest)})" + (f": {', '.join(fields)}" if fields else "")


def is_record(cls: type) -> bool:
    """Whether a class is a dataclass or a named tuple: the order of its annotations is that of its arguments."""
    return hasattr(cls, "__dataclass_fields__") or hasattr(cls, "_field_defaults")


def package_of(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def members(cls: type, public: Sequence[type] = ()) -> dict[str, str]:
    """Public methods, properties and attributes, those of base classes too as far as they are of the same package."""
    known = {base for other in public if issubclass(cls, other) for base in other.__mro__}
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if package_of(base) == package_of(cls) and base not in known:
            found |= own_members(base)
    return {name: text for name, text in found.items() if not name.startswith("_") or name == "__init__"}


def own_members(cls: type) -> dict[str, str]:
    node, found = definition(cls), {}
    for each in ast.walk(node):  # what methods assign to self
        target = each.target if isinstance(each, ast.AnnAssign) else each
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
            if isinstance(each, ast.AnnAssign):
                found[target.attr] = f"attribute: {ast.unparse(each.annotation)}"
            elif isinstance(target.ctx, ast.Store):
                found.setdefault(target.attr, "attribute")
    for each in node.body:
        if isinstance(each, ast.FunctionDef):
            found[each.name] = method(vars(cls)[each.name])
        elif isinstance(each, ast.AnnAssign):
            found[each.target.id] = f"attribute: {ast.unparse(each.annotation)}{default(cls, each.target.id)}"
        elif isinstance(each, ast.Assign):
            found |= {target.id: f"attribute{default(cls, target.id)}" for target in each.targets}
    return found


def method(member: Any) -> str:
    if isinstance(member, classmethod | staticmethod):
        return f"{type(member).__name__} {signature(member.__func__)}"
    getter = getattr(member, "fget", None) or getattr(member, "func", None)  # of a property, or one that is cached
    if getter is None:
        return signature(member)
    settable = "" if getattr(member, "fset", None) is None else ", can be set"
    return f"property{returned(definition(getter))}{settable}"


def default(cls: type, name: str) -> str:
    """What a class attribute or a field is if nothing else is said."""
    field = getattr(cls, "__dataclass_fields__", {}).get(name)
    if field is not None and callable(field.default_factory):
        return f" = {shown(field.default_factory)}()"
    values = getattr(cls, "_field_defaults", vars(cls))
    return f" = {shown(values[name])}" if name in values else ""


def differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """A line for each name that was added or removed, three lines for each that was changed."""
    lines = []
    for name in sorted({*before, *now}):
        if name not in before:
            lines.append(f"added    {name}  {now[name]}")
        elif name not in now:
            lines.append(f"removed  {name}  {before[name]}")
        elif before[name] != now[name]:
            lines += [f"changed  {name}", f"         from  {before[name]}", f"         to    {now[name]}"]
    return lines


def problem() -> str:
    """How the package differs from the lock, and what to do about it; empty if it does not."""
    lines = differences(json.loads(LOCK.read_text(encoding="utf-8")), public_names())
    first = f"The public names are not those of tests/{LOCK.name}:"
    return "\n".join([first, *lines, f"If that is meant, write them down: {COMMAND}"]) if lines else ""


def main(arguments: list[str]) -> int:
    if arguments == ["--write"]:
        names = public_names()
        LOCK.write_text(json.dumps(names, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{len(names)} names in tests/{LOCK.name}")
        return 0
    if arguments:
        print(f"python -m tests.api: got {' '.join(arguments)!r}, expected nothing or --write", file=sys.stderr)
        return 2
    found = problem()
    print(found or f"The public names are those of tests/{LOCK.name}.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
