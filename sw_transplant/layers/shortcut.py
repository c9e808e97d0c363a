"""The shortest way into a layer on a CPU: a call that is just like the one before asks only what could have changed.

A small convolution takes 50 us, PyTorch's own Python 5 of them. Whatever a layer asks before it runs counts, the more
as the convolution before it has emptied the processor's caches. Hence one function for all questions, which holds what
it compares with, for the layers that there are most of: those that are one kernel. What is not as it was goes the long
way, through the planner.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from sw_transplant.layers.watch import Steps, Watch
from sw_transplant.ops.depthwise import Step

Shortcut = Callable[[Tensor], Tensor | None]
"""The layer's output, or None for a call that has to go the long way."""


def shortcut(layer: nn.Module, like: Tensor, step: Step, watch: Watch) -> Shortcut | None:
    """What serves calls with plain maps that are just like this one, outside of compilers.

    It compares what :class:`Watch` does, where that is not said already: by the modes, which mean nothing without a
    norm, or by the placements, of which the layer has a copy.

    Args:
        layer: a :class:`ShiftwiseConv2d`.
        like: a map on a CPU, seen without autocast.
        step: what the layer does with such maps where no gradient is wanted.
        watch: on the layer; it keeps memory alive, whose addresses could else come to mean other tensors.

    Returns:
        None for a layer that is more than one kernel: several branches, norms, edges, masks.
    """
    modules, branches = layer._modules, layer._modules["branches"]
    parts = branches._modules  # type: ignore[union-attr]
    branch = parts.get("0")
    if branch is None or len(parts) > 1 or branch._modules:
        return None
    norms, parameters, buffers = branch._modules, branch._parameters, branch._buffers
    found, bias = parameters.get("bank"), parameters.get("bias")
    if found is None or parameters.get("gain") is not None or buffers.get("mask") is not None:
        return None
    bank: Tensor = found
    version, address = bank._version, bank.data_ptr()
    if bias is not None:
        bias_version, bias_address = bias._version, bias.data_ptr()
    module, part, parameter, buffer = modules.get, parts.get, parameters.get, buffers.get
    run, dispatched, shape, strides, dtype = *step, like.shape, like.stride(), like.dtype
    grad_enabled, autocasts, tracing = torch.is_grad_enabled, torch._C._is_any_autocast_enabled, torch._C._is_tracing
    modes, transforms = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active
    wants_gradients, steps, optimized = watch.wants_gradients, Steps, watch.step

    def served(x: Tensor) -> Tensor | None:
        if (
            type(x) is Tensor
            and not tracing()
            and x.shape == shape
            and parameter("bank") is bank
            and parameter("bias") is bias
            and bank._version == version
            and bank.data_ptr() == address
            and (bias is None or (bias._version == bias_version and bias.data_ptr() == bias_address))
            and module("branches") is branches
            and part("0") is branch
            and len(parts) == 1
            and not norms
            and parameter("gain") is None
            and buffer("mask") is None
            and steps.last is optimized
            and not autocasts()
            and not (grad_enabled() and (x.requires_grad or wants_gradients()))
            and (dispatched or (x.stride() == strides and x.dtype is dtype and x.is_cpu))
            and (dispatched or (forward_ad._current_level < 0 and not modes() and not transforms()))
        ):
            return run(x)
        return None

    return served
