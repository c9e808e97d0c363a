"""What compilers need to be told, and whether the tensors of a call stand for others."""

import sys
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.fx
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., object])


def constant_when_traced(function: Function) -> Function:
    """Call the function while tracing, and take its result as a constant of the graph.

    What `torch.compiler.assume_constant_result` does; that one imports the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_observed() -> bool:
    """Whether somebody records or reinterprets operations: a compiler, a tracer, torch.func, a mode of dispatch."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
        or torch._C._len_torch_dispatch_stack()
        or _stand_for_others()
    )


@constant_when_traced
def is_for_onnx() -> bool:
    """Whether a model is being exported to ONNX, which knows PyTorch's operators and none of our own."""
    return "torch.onnx._internal.exporter" in sys.modules and torch.onnx.is_in_onnx_export()


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: tensors stand for others, or carry tangents."""
    return not torch.compiler.is_compiling() and _stand_for_others()


def _stand_for_others() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
