"""What in a model's own code may notice that a convolution has become another class: for the report, refuses nothing.

A converted layer has the attributes of an ``nn.Conv2d``, and is none. Code that asks for the class takes another way
from then on; code that reads a layer's ``weight`` gets a kernel that is computed for it, and that cannot be written to.
Both are looked for in the source of the methods of a model's classes. Where there is no source, the names in the byte
code must do.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd

from sw_transplant.find.match import join_path
from sw_transplant.find.rules import is_depthwise, looks_like_conv

_NOT_OWN = ("torch", "sw_transplant")
_CLASS_NAMES = frozenset({"Conv2d", "_ConvNd"})
_ASKING = frozenset({"isinstance", "issubclass", "type", "__class__"})
_HARMLESS = frozenset(
    {"shape", "size", "dtype", "device", "ndim", "dim", "numel", "element_size", "requires_grad", "is_cuda", "is_meta"}
)
_ASKED = "asks whether something is an instance of Conv2d: converted layers are none, though they have its attributes"
_READ = "of a converted layer that is a kernel computed for who reads it; layer.set_weight(tensor) writes"

Attributes = tuple[str, ...]  # ("convs", "0") for self.convs[0]


class _Method(NamedTuple):
    """What the source of a method says: of what it asks whether it is a convolution, and whose ``weight`` it reads."""

    where: str
    asks: tuple[Attributes | None, ...]  # None for what is not an attribute of self: a module from a loop, say
    reads: tuple[Attributes, ...]


def notes_on(model: nn.Module, sites: Collection[nn.Module] | None = None) -> list[str]:
    """What somebody should know who converts a model, though nothing speaks against it.

    Args:
        model: any module; nothing of it is run.
        sites: the modules that will be replaced; None for every depthwise convolution.

    Returns:
        One sentence for each method that asks whether something is a convolution, and for each place where a method
        reads the ``weight`` of a site for more than its shape, dtype or device; sorted, each once.
    """
    inside = _inside(model, sites)
    notes = set()
    for path, module in model.named_modules():
        if module in inside:
            continue  # its code goes with it
        for method in _methods(type(module)):  # type: ignore[arg-type]
            if any(attributes is None or _follow(module, attributes) in inside for attributes in method.asks):
                notes.add(f"{method.where} {_ASKED}")
            for attributes in method.reads:
                if _follow(module, attributes) in inside:
                    notes.add(f"{method.where} reads {join_path(path, '.'.join(attributes))}.weight: {_READ}")
    return sorted(notes)


def _inside(model: nn.Module, sites: Collection[nn.Module] | None) -> set[nn.Module]:
    if sites is None:
        sites = [module for module in model.modules() if looks_like_conv(module) and is_depthwise(module)]
    return {part for site in sites for part in site.modules()}


def _follow(module: nn.Module, attributes: Attributes) -> object:
    """``module.a.b``, a number standing for an item; None where there is no such module."""
    found: Any = module
    for name in attributes:
        if not isinstance(found, nn.Module):
            return None
        found = found._modules.get(name)
    return found


# ---- the methods of a class ----


@lru_cache(maxsize=4096)
def _methods(kind: type[nn.Module]) -> list[_Method]:
    """The methods that say anything, those of base classes included: they may be called by way of super()."""
    found = []
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in _NOT_OWN or not issubclass(base, nn.Module):
            continue
        for name, value in vars(base).items():
            function = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else None
            if name != "__init__" and isinstance(function, FunctionType):  # that one runs before anything is converted
                found.append(_read(f"{base.__name__}.{name}", function))
    return [method for method in found if method.asks or method.reads]


def _read(where: str, function: FunctionType) -> _Method:
    names = set(_names(function.__code__))
    if not names & (_ASKING | _CLASS_NAMES | {"weight"}):
        return _Method(where, (), ())
    node = _functions_in(function.__code__.co_filename).get((function.__name__, function.__code__.co_firstlineno))
    if node is None:
        return _Method(where, (None,) if names & _ASKING and names & _CLASS_NAMES else (), ())
    aliases = _aliases(node)
    asked = {_path_of(thing, aliases) for part in ast.walk(node) if (thing := _asks(part, function)) is not None}
    return _Method(where, tuple(asked), tuple(_reads(node, aliases)))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@lru_cache(maxsize=256)
def _functions_in(file: str) -> dict[tuple[str, int], ast.AST]:
    """The functions of a file by their names and their first lines, as code objects know them."""
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return {}
    found: dict[tuple[str, int], ast.AST] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name, first] = node
    return found


# ---- who asks for the class ----


def _asks(node: ast.AST, function: FunctionType) -> ast.AST | None:
    """Of what a piece of code asks whether it is a convolution; None where it does not."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 2:
        asking = node.func.id in ("isinstance", "issubclass") and _means_convolution(node.args[1], function)
        return node.args[0] if asking else None
    if isinstance(node, ast.Compare) and (thing := _whose_class(node.left)) is not None:
        return thing if any(_means_convolution(other, function) for other in node.comparators) else None
    if isinstance(node, ast.MatchClass):
        return node.cls if _means_convolution(node.cls, function) else None
    return None


def _whose_class(node: ast.expr) -> ast.expr | None:
    """x of ``type(x)`` and of ``x.__class__``."""
    if isinstance(node, ast.Attribute) and node.attr == "__class__":
        return node.value
    is_type = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type"
    return node.args[0] if is_type and node.args else None  # type: ignore[attr-defined]


def _means_convolution(node: ast.expr, function: FunctionType) -> bool:
    """Whether an expression names the class of a convolution, alone or among others."""
    for part in ast.walk(node):
        if isinstance(part, (ast.Name, ast.Attribute)):
            value = _value_of(part, function)
            classes = value if isinstance(value, (tuple, list, set, frozenset)) else (value,)
            if any(isinstance(one, type) and issubclass(one, _ConvNd) for one in classes):
                return True
            if value is None and (part.attr if isinstance(part, ast.Attribute) else part.id) in _CLASS_NAMES:
                return True
    return False


def _value_of(node: ast.expr, function: FunctionType) -> Any:
    """What a dotted name stands for among the globals of a function; None where that is not known."""
    if isinstance(node, ast.Name):
        return function.__globals__.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _value_of(node.value, function)
        return None if owner is None else inspect.getattr_static(owner, node.attr, None)
    return None


# ---- who reads a weight ----


def _reads(node: ast.AST, aliases: dict[str, Attributes]) -> set[Attributes]:
    """The attributes of self whose weight is read for more than what any kernel of its size answers alike."""
    parts = list(ast.walk(node))
    harmless = {id(part.value) for part in parts if isinstance(part, ast.Attribute) and part.attr in _HARMLESS}
    read = [part for part in parts if isinstance(part, ast.Attribute) and part.attr == "weight"]
    paths = [_path_of(part.value, aliases) for part in read if id(part) not in harmless]
    return {path for path in paths if path}


def _aliases(node: ast.AST) -> dict[str, Attributes]:
    """Local names of attributes of self: conv after ``conv = self.conv``."""
    aliases: dict[str, Attributes] = {}
    for part in ast.walk(node):
        if isinstance(part, ast.Assign) and len(part.targets) == 1 and isinstance(part.targets[0], ast.Name):
            path = _path_of(part.value, aliases)
            if path is not None:
                aliases[part.targets[0].id] = path
    return aliases


def _path_of(node: ast.AST, aliases: dict[str, Attributes]) -> Attributes | None:
    """``self.a[0].b`` as ("a", "0", "b"); None for anything else."""
    if isinstance(node, ast.Name):
        return () if node.id == "self" else aliases.get(node.id)
    if isinstance(node, ast.Attribute):
        owner, name = _path_of(node.value, aliases), node.attr
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        owner, name = _path_of(node.value, aliases), str(node.slice.value)
    else:
        return None
    return None if owner is None else (*owner, name)
