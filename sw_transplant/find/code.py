"""What the code behind a forward mentions, without running it: names of attributes, of functions, and strings.

A name says what may happen, not what does: where one speaks against a replacement, the site is left alone.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d

_SWITCHES = frozenset(
    {"no_grad", "enable_grad", "set_grad_enabled", "inference_mode", "autocast", "checkpoint", "checkpoint_sequential"}
)
_KINDS = frozenset({"Conv2d", "_ConvNd"})
_TENSORS = frozenset({"weight", "bias", "parameters", "named_parameters", "state_dict"})
_TOUCHES = frozenset(
    {"data", "init", "out", "grad", "requires_grad", "is_leaf", "_version", "data_ptr", "Parameter", "functional_call"}
)
"""Beside names that end in an underscore: what reads or writes more of a parameter than its values."""
_WALKS = frozenset({"children", "named_children", "modules", "named_modules"})
_ENTRIES = ("forward", "train", "eval", "__call__")
"""What others call without asking; the rest runs when it is mentioned."""
_INDEXING = frozenset({"BINARY_SUBSCR", "BINARY_OP", "GET_ITER", "GET_LEN"})


def switches(module: nn.Module) -> str | None:
    """What a module's forward does to gradients, autocast or memory, as a reason against replacing it; or None."""
    found = sorted(_mentioned(module)[0] & _SWITCHES)
    return f"the forward of {type(module).__name__} uses {found[0]}, which would be lost" if found else None


def reached(site: nn.Module, holders: Sequence[nn.Module]) -> str | None:
    """Whether the forward of a module around a site asks for a part of it that its replacement will not have.

    Args:
        site: what would be replaced.
        holders: the modules around it, the one that holds it first.

    Returns:
        A reason against the replacement, or None.
    """
    lost = _lost_names(site)
    for holder in holders:
        names, operations = _mentioned(holder)
        if names & _KINDS:
            return f"the forward of {type(holder).__name__} mentions {min(names & _KINDS)}, which a replacement is not"
        touched = names & _TENSORS
        writing = sorted(name for name in names if name in _TOUCHES or (name.endswith("_") and name[0] != "_"))
        if touched and writing:
            what = f"the forward of {type(holder).__name__} uses {min(touched)} and {writing[0]}"
            return f"{what}: it may do more than read them"
        if site._modules and (walks := sorted(_names_of_forward(type(holder)) & _WALKS)):  # type: ignore[arg-type]
            return f"the forward of {type(holder).__name__} uses {walks[0]}: it may count or visit what it holds"
        asked = sorted(name for name in names & lost if not hasattr(holder, name))  # else it may mean its own
        if asked:
            return f"the forward of {type(holder).__name__} asks for {asked[0]}, which only this layer has"
    if isinstance(site, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) and holders:
        names, operations = _mentioned(holders[0])
        slots = {name for name, child in holders[0].named_children() if child is site}
        if slots & names and operations & _INDEXING:
            return f"the forward of {type(holders[0]).__name__} may index or walk through it"
    return None


def _lost_names(site: nn.Module) -> frozenset[str]:
    """What can be asked of a site and not of its replacement."""
    held = {*vars(site), *site._modules, *site._parameters, *site._buffers}
    return frozenset(held | _class_names(type(site))) - _OFFERED  # type: ignore[arg-type]


@functools.cache
def _class_names(kind: type[nn.Module]) -> frozenset[str]:
    names = {name for each in kind.__mro__ if each not in (nn.Module, object) for name in vars(each)}
    return frozenset(name for name in names if not name.startswith("__"))


# What a convolution of PyTorch offers as well: other names of the replacement mean other things.
_OFFERED = frozenset({"in_channels", "out_channels", "groups", "stride", *dir(ShiftwiseConv2d)}).intersection(
    dir(nn.Conv2d(1, 1, 1, device="meta"))
)


def _mentioned(module: nn.Module) -> tuple[frozenset[str], frozenset[str]]:
    """Names, strings and operations in all code that the module's forward may run: methods, functions beside them."""
    own = [module.__dict__[name] for name in _ENTRIES if name in module.__dict__]
    if own:
        return _names_of(type(module), own)
    return _names_of_class(type(module))  # type: ignore[arg-type]


@functools.cache
def _names_of_class(kind: type[nn.Module]) -> tuple[frozenset[str], frozenset[str]]:
    return _names_of(kind, [])


def _names_of(kind: type[nn.Module], more: Sequence[Any]) -> tuple[frozenset[str], frozenset[str]]:
    names: set[str] = set()
    operations: set[str] = set()
    for function in _functions(kind, more):
        for code in _nested(function.__code__):
            names |= _names_in(code)
            operations.update(instruction.opname for instruction in dis.get_instructions(code))
    return frozenset(names), frozenset(operations)


def functions_of(module: nn.Module) -> tuple[FunctionType, ...]:
    """The functions that a module's forward may run, judged by their names, with those that are wrapped around them."""
    return _functions_of_class(type(module))  # type: ignore[arg-type]


@functools.cache
def _functions_of_class(kind: type[nn.Module]) -> tuple[FunctionType, ...]:
    return tuple(each for wrapped in _wrapped_functions(kind, []) for each in wrapped)


def _functions(kind: type[nn.Module], more: Sequence[Any]) -> Iterator[FunctionType]:
    return (wrapped[-1] for wrapped in _wrapped_functions(kind, more))


def _wrapped_functions(kind: type[nn.Module], more: Sequence[Any]) -> Iterator[list[FunctionType]]:
    """Functions that the entries mention, without PyTorch's own: each as the outermost wrapper, what it wraps, ..."""
    waiting, seen = [*more, *(getattr(kind, name) for name in _ENTRIES)], set()
    while waiting:
        wrapped = _unwrapped(waiting.pop())
        function = wrapped[-1] if wrapped else None
        if function is None or function.__code__ in seen or function.__module__.partition(".")[0] == "torch":
            continue
        seen.add(function.__code__)
        yield wrapped
        used = frozenset().union(*map(_names_in, _nested(function.__code__)))
        waiting += [found for name in used for each in kind.__mro__ if (found := vars(each).get(name)) is not None]
        waiting += [function.__globals__[name] for name in used & function.__globals__.keys()]


@functools.cache
def _names_of_forward(kind: type[nn.Module]) -> frozenset[str]:
    """The names in a forward itself, not in what it calls: what is common there would speak against all models."""
    function = _plain(kind.forward)
    return frozenset() if function is None else frozenset().union(*map(_names_in, _nested(function.__code__)))


def _names_in(code: CodeType) -> frozenset[str]:
    return frozenset(code.co_names).union(constant for constant in code.co_consts if isinstance(constant, str))


def whole_numbers(module: nn.Module) -> set[int]:
    """Whole numbers in a module's own attributes and in the code of its forward: sizes that it may treat apart."""
    numbers = {value for value in vars(module).values() if type(value) is int}
    function = _plain(type(module).forward)
    if function is not None and function.__module__.partition(".")[0] != "torch":
        for code in _nested(function.__code__):
            numbers.update(constant for constant in code.co_consts if type(constant) is int)
    return numbers


def _plain(value: Any) -> FunctionType | None:
    """The function behind a method, a property, a decorator or a partial; None where there is none in Python."""
    wrapped = _unwrapped(value)
    return wrapped[-1] if wrapped else None


def _unwrapped(value: Any) -> list[FunctionType]:
    """The functions behind a value, from the outermost to the innermost."""
    found: list[FunctionType] = []
    while value is not None and value not in found:
        if isinstance(value, FunctionType):
            found.append(value)
        if isinstance(value, (staticmethod, classmethod, MethodType)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, functools.partial):
            value = value.func
        else:
            value = getattr(value, "__wrapped__", None) if callable(value) else None
    return found


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
