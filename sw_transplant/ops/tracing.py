"""What compilers need to be told, and whether the tensors of a call stand for others."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., object])


def constant_when_traced(function: Function) -> Function:
    """Call the function while tracing, and take its result as a constant of the graph.

    What `torch.compiler.assume_constant_result` does; that one imports the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: tensors stand for others, or carry tangents."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
