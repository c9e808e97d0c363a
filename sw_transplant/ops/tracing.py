"""What compilers that trace Python need to be told."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_when_traced(function: Function) -> Function:
    """Call the function while tracing, and take its result as a constant of the graph.

    What `torch.compiler.assume_constant_result` does; that one imports the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
