"""What can be come to from an attribute or a function: through containers, methods, closures and any other object.

Python's garbage collector knows what an object refers to, whatever its class. What it knows of a function is too much,
since every function refers to all globals of its file; of these only those count that its code reads.
"""

from __future__ import annotations

import dis
import functools
import gc
import logging
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, ModuleType
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from sw_transplant.find.code import functions_of

_REGISTERED = frozenset({"_modules", "_parameters", "_buffers"})
_PLAIN = (
    *(int, float, complex, str, bytes, bytearray, type(None), type, ModuleType, CodeType, torch.dtype, torch.device),
    logging.Logger,  # which leads to every logger of the program
)
_READS = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
_MOST = 50_000
"""So many objects are looked at from one attribute: what holds more holds the whole program."""


def reach(value: Any, ends: Callable[[Any], bool]) -> Iterator[Any]:
    """A value, and all that can be come to from it.

    Args:
        value: anything; it is not changed, and nothing of it is called.
        ends: true for objects that are given, but not looked into.
    """
    waiting: list[Any] = [value]
    seen: dict[int, Any] = {}
    while waiting and len(seen) < _MOST:
        each = waiting.pop()
        if isinstance(each, _PLAIN) or id(each) in seen:
            continue
        seen[id(each)] = each  # which keeps it alive: an id is given again to another object else
        yield each
        if not ends(each):
            waiting += _next(each)


def holdings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module holds beside its parameters, buffers and children, by names such as ``"held"``.

    Args:
        module: neither run nor changed. Attributes count, its hooks and those of its parameters among them, and
            attributes of its class.
    """
    for name, value in vars(module).items():
        if name not in _REGISTERED and not isinstance(value, _PLAIN):
            yield name, value
    for name, parameter in module._parameters.items():
        if parameter is not None and (hooks := _hooks(parameter)):
            yield f"{name}._backward_hooks", hooks
    for kind in type(module).__mro__:
        if kind.__module__.partition(".")[0] not in ("torch", "builtins"):
            for name, value in vars(kind).items():
                if name[:2] != "__" and not isinstance(value, (FunctionType, property, classmethod, staticmethod)):
                    yield name, value
    for function in functions_of(module):
        yield function.__name__, list(_of_function(function))


def _next(value: Any) -> list[Any]:
    if isinstance(value, FunctionType):
        return list(_of_function(value))
    if isinstance(value, ReferenceType):
        return [value()]
    if isinstance(value, Tensor):
        return [vars(value), *_hooks(value)]
    if isinstance(value, BuiltinFunctionType):
        return [value.__self__]
    if isinstance(value, (property, MappingProxyType)):
        return []
    return gc.get_referents(value)


def _hooks(tensor: Tensor) -> list[Any]:
    if not tensor.is_leaf:
        return []
    return [hooks for hooks in (tensor._backward_hooks, tensor._post_accumulate_grad_hooks) if hooks]


def _of_function(function: FunctionType) -> Iterator[Any]:
    """What a function has got hold of: closures, defaults, its attributes, and global variables that it reads."""
    yield from (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()
    if str(function.__globals__.get("__name__")).partition(".")[0] != "torch":
        yield from (
            function.__globals__[name] for name in globals_read(function.__code__) if name in function.__globals__
        )


@functools.lru_cache(maxsize=4096)
def globals_read(code: CodeType) -> frozenset[str]:
    """Names of the global variables that code reads, the functions inside it included."""
    names = {instruction.argval for instruction in dis.get_instructions(code) if instruction.opname in _READS}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= globals_read(constant)
    return frozenset(names)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # not assigned yet
        return False
