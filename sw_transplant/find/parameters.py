"""What a layer's parameters are asked before another parameter takes their place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

_NO_PARAMETER = (
    "its {name} is no Parameter (a buffer, or computed by other code), so that it cannot be laid out once and for all; "
    "make it an nn.Parameter"
)
_AFTER_ACCUMULATION = (
    "its {name} has a hook that runs after gradients are accumulated, which is called with the parameter itself; "
    "remove it, convert, and register it on the new parameters, those of layer.parameters()"
)
_NO_VALUES = (
    "its {name} is on the meta device and has no values, and mode 'shiftwise' fits modules to values; load the weights "
    "first, then convert"
)
_NO_KERNEL_GRADIENT = (
    "its {name} has tensor hooks, which see gradients of the kernel; {why}, there are none; remove the hooks first"
)


def reason_against_parameters(
    parameters: Mapping[str, Tensor | None], *, mode: str = "laid_out", edges: int = 1
) -> str | None:
    """Why no bank can take the place of a layer's weight, or no parameter that of its bias; None if one can.

    Args:
        parameters: by the names that the reason calls them by, what the layer has there: ``{"weight": conv.weight,
            "bias": conv.bias}``. None for what it has not.
        mode, edges: of the conversion.
    """
    for name, tensor in parameters.items():
        if tensor is None:
            continue
        if not isinstance(tensor, nn.Parameter):
            return _NO_PARAMETER.format(name=name)
        if tensor._post_accumulate_grad_hooks:
            return _AFTER_ACCUMULATION.format(name=name)
        if tensor.is_meta and mode != "laid_out":
            return _NO_VALUES.format(name=name)
        is_kernel = tensor.dim() > 1
        if tensor._backward_hooks and (mode != "laid_out" or (is_kernel and edges > 1)):
            why = "in mode 'shiftwise'" if mode != "laid_out" else f"with edges={edges}"
            return _NO_KERNEL_GRADIENT.format(name=name, why=why)
    return None
