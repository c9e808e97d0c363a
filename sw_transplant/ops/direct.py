"""Operators called without the dispatcher, where nobody but autograd needs to know of the call.

Through the dispatcher, an operator of `torch.library` that is written in Python takes 15 to 20 us, and with a gradient
100 to 300: more than many a kernel. Compilers, tracers, modes of dispatch, transforms and subclasses of tensors need
it; plain tensors in eager mode do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sw_transplant.ops.tracing import is_observed

PLAIN = (Tensor, nn.Parameter)


class Operator(NamedTuple):
    """What an operator is to the dispatcher, as functions: what it runs, what it saves, and its gradient."""

    run: Callable[..., Any]
    save: Callable[[Any, tuple[Any, ...], Any], None]
    grad_of: Callable[..., tuple[Any, ...]]


_OPERATORS: dict[str, Operator] = {}


def register(name: str, operator: Operator) -> None:
    """Says what ``torch.ops.sw_transplant.<name>`` does; its arguments are tensors, lists of them, and what is neither.

    Args:
        name: of the operator.
        operator: the functions that were given to `torch.library`.
    """
    _OPERATORS[name] = operator


def call(name: str, *arguments: Any) -> Any:
    """What ``torch.ops.sw_transplant.<name>(*arguments)`` returns, with the same gradients."""
    tensors: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
        elif isinstance(argument, list | tuple) and argument and isinstance(argument[0], Tensor):
            tensors += argument
    if is_observed() or any(type(tensor) not in PLAIN or tensor.is_meta for tensor in tensors):
        return getattr(torch.ops.sw_transplant, name)(*arguments)
    operator = _OPERATORS[name]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        results = _Recorded.apply(operator, arguments, *tensors)
        return list(results) if isinstance(results, tuple) else results
    return operator.run(*arguments)


class _Recorded(torch.autograd.Function):
    """An operator in autograd's graph. The tensors are those in the arguments, which autograd wants one by one."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, arguments: tuple[Any, ...], *tensors: Tensor) -> Any:
        output = operator.run(*arguments)
        operator.save(ctx, arguments, output)
        ctx.operator, ctx.gives_list = operator, isinstance(output, list)
        ctx.shape = [len(a) if _is_list(a) else isinstance(a, Tensor) or None for a in arguments]
        return tuple(output) if ctx.gives_list else output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        needed = _as_arguments(ctx.shape, ctx.needs_input_grad[2:], False)
        found = ctx.operator.grad_of(_Context(ctx, needed), list(grads) if ctx.gives_list else grads[0])
        flat: list[Tensor | None] = []
        for shape, gradient in zip(ctx.shape, found, strict=True):
            if shape is True:
                flat.append(gradient)
            elif shape is not None:
                flat += gradient if gradient is not None else [None] * shape
        return None, None, *flat


class _Context:
    """The context that `grad_of` expects: which gradients are needed, as the arguments are, and what was saved."""

    def __init__(self, context: Any, needs_input_grad: tuple[Any, ...]) -> None:
        self._context, self.needs_input_grad = context, needs_input_grad

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _is_list(argument: Any) -> bool:
    return isinstance(argument, list | tuple) and bool(argument) and isinstance(argument[0], Tensor)


def _as_arguments(shapes: Sequence[int | bool | None], flat: Sequence[Any], other: Any) -> tuple[Any, ...]:
    """Values of the tensors, as the arguments hold them; ``other`` for what is no tensor."""
    values, structured = iter(flat), []
    for shape in shapes:
        if shape is True:
            structured.append(next(values))
        elif shape is None:
            structured.append(other)
        else:
            structured.append([next(values) for _ in range(shape)])
    return tuple(structured)
