"""What belongs to a parameter beside its values, and is kept when another one takes its place.

Attributes that somebody set on it (``_no_weight_decay``, a learning rate of its own), ``requires_grad``, a gradient
that is there already, and the hooks that see its gradient. A copy of a model by ``copy.deepcopy`` has none of them but
``requires_grad``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sw_transplant.layers.layout import Layout

Hook = Callable[[Tensor], Tensor | None]
_NOT_ATTRIBUTES = ("_is_param",)


class KernelHooks:
    """One hook of a bank that calls those of a kernel, with gradients of the kernel's shape.

    A hook may do anything with a gradient: mask some taps, average, write it down. So the bank's gradient is put
    together to that of the kernel, goes through the hooks, and what they return is laid out again.

    Args:
        hooks: of the kernel, in the order of their calls. They are looked up at each call, so that a hook that is
            removed by its handle is not called any longer.
        layout: how the kernel lies in the bank; None where they are of one shape, as biases are.
    """

    def __init__(self, hooks: Mapping[Any, Hook], layout: Layout | None) -> None:
        self.hooks, self.layout = hooks, layout

    def __call__(self, grad: Tensor) -> Tensor | None:
        if not self.hooks:
            return None
        given = grad if self.layout is None else self.layout.to_dense(grad)
        for hook in list(self.hooks.values()):
            result = hook(given)
            given = given if result is None else result
        return given if self.layout is None else self.layout.to_bank(given)


def take_over(parameter: nn.Parameter, original: nn.Parameter, layout: Layout | None = None) -> None:
    """Gives a parameter what belongs to the one whose place it takes: attributes, ``requires_grad``, gradient, hooks.

    Hooks stay alive: one that is added to the original, which had some before, or removed from it later, is added or
    removed here.

    Args:
        parameter: changed, but for its values.
        original: not changed.
        layout: how the original lies in ``parameter``; None where they are of one shape.
    """
    parameter.requires_grad_(original.requires_grad)
    take_attributes(parameter, [original])
    with torch.no_grad():
        if original.grad is not None:
            grad = original.grad.clone() if layout is None else layout.to_bank(original.grad)
            parameter.grad = grad.to(parameter)
    if original._backward_hooks is not None:
        _hooked(parameter, parameter.register_hook, KernelHooks(original._backward_hooks, layout))


def take_attributes(parameter: Tensor, originals: Iterable[Tensor]) -> None:
    """Gives a parameter the attributes that all those whose place it takes agree on."""
    first, *others = [_attributes(original) for original in originals]
    for name, value in first.items():
        if all(name in other and _equal(other[name], value) for other in others):
            setattr(parameter, name, value)


def drop_hooks(parameter: nn.Parameter) -> None:
    """Removes the hooks that were those of a kernel; who hooked the parameter itself keeps them."""
    hooks = parameter._backward_hooks or {}
    for key in [key for key, hook in hooks.items() if isinstance(hook, KernelHooks)]:
        del hooks[key]


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters keep their attributes and hooks, which ``copy.deepcopy`` loses.

    Hooks are the same functions, as hooks of modules are; a handle of the original does not remove them from the copy.
    """
    memo: dict[int, Any] = {}
    twin = copy.deepcopy(model, memo)
    for original in model.parameters():
        parameter = memo.get(id(original))
        if not isinstance(parameter, nn.Parameter) or parameter is original:
            continue
        for name, value in _attributes(original).items():
            if name not in vars(parameter):
                setattr(parameter, name, copy.deepcopy(value, memo))
        for hook in (original._backward_hooks or {}).values():
            _hooked(parameter, parameter.register_hook, hook)
        for hook in (original._post_accumulate_grad_hooks or {}).values():
            _hooked(parameter, parameter.register_post_accumulate_grad_hook, hook)
    return twin


def _hooked(parameter: nn.Parameter, register: Callable[[Any], Any], hook: Any) -> None:
    """Registers a hook, also on a parameter that is frozen for now."""
    wanted = parameter.requires_grad
    parameter.requires_grad_(True)
    register(hook)
    parameter.requires_grad_(wanted)


def _attributes(tensor: Tensor) -> dict[str, Any]:
    return {name: value for name, value in vars(tensor).items() if name not in _NOT_ATTRIBUTES}


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    return bool(type(one) is type(other) and one == other)
