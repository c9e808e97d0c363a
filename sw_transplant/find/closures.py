"""Who else has got hold of a part of a model: functions, which copies share, and attributes that are no submodules.

``copy.deepcopy`` copies attributes, but a function stays the same function. One that was put on an instance and has
got hold of a layer, as in ``model.forward = lambda x: head(body(x))``, goes on calling the original's layers: to
convert a copy would change nothing, in silence. Bound methods and partials are copied with what they are bound to.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_REGISTERED = frozenset({"_modules", "_parameters", "_buffers"})
_DEEPEST = 4
"""So many containers within each other are looked into."""


def held_beside(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Modules and tensors that attributes of a model's modules hold, beside those that are registered there.

    Who is held in a list, or bound to a method or a function that is kept, is used without the model's knowing: a
    replacement in its place would not be.

    Returns:
        By ``id``: the modules with such an attribute, and its name, such as ``"blocks.0.held"``. Hooks count as well.
    """
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _REGISTERED and not isinstance(value, (int, float, str, bool, type(None))):
                for held in _references(value):
                    if isinstance(held, (nn.Module, Tensor)) and held is not module:
                        found.setdefault(id(held), []).append((module, f"{path or 'model'}.{name}"))
    return found


def _references(value: Any, depth: int = _DEEPEST) -> Iterator[Any]:
    """What can be come to from a value through containers, methods, partials and functions."""
    yield value
    if depth == 0:
        return
    inner: list[Any] = []
    if isinstance(value, (list, tuple, set, frozenset)):
        inner = list(value)
    elif isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, functools.partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, MethodType):
        inner = [value.__self__, value.__func__]
    elif isinstance(value, FunctionType):
        inner = list(_kept_by_copies(value))
    for each in inner:
        yield from _references(each, depth - 1)


def stays_with_original(model: nn.Module) -> str | None:
    """What a copy of the model would take over from the model itself, as a reason not to convert a copy; or None.

    Args:
        model: any module; it is neither run nor changed. Functions among the attributes of its modules are looked at.
    """
    names = {id(module): f"layer {path!r}" if path else "the model" for path, module in model.named_modules()}
    names |= {id(parameter): f"parameter {path!r}" for path, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            for held in _kept_by_copies(value):
                if id(held) in names:
                    what = f"{path or 'model'}.{name} is a function that holds {names[id(held)]} of this very model"
                    return f"{what}: a copy would go on calling it; convert with inplace=True"
    return None


def _kept_by_copies(value: Any) -> Iterator[Any]:
    """What the functions in a value have got hold of: closures, defaults, and global variables that they mention."""
    waiting, seen = [value], set()
    while waiting:
        function = waiting.pop()
        function = function.__func__ if isinstance(function, MethodType) else function
        function = function.func if isinstance(function, functools.partial) else function
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        named = [function.__globals__.get(name) for name in function.__code__.co_names]
        for held in (*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *named):
            parts = [*held] if isinstance(held, (list, tuple)) else [held]
            parts = [*held.values()] if isinstance(held, dict) else parts
            for part in parts:
                yield part
                yield getattr(part, "__self__", None)
                waiting.append(part)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # not assigned yet
        return False
