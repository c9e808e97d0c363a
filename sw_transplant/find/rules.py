"""Which convolutions can be replaced, and why another cannot: rules for a single layer.

A layer passes when everything that its call does is known: nn.Conv2d's own forward, zero padding, no hooks, no
parametrization. What a class with a forward of its own must be, if it is a convolution, is found by running it
(:func:`probe_padding`).
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from sw_transplant.find.code import switches
from sw_transplant.find.traces import told, undisturbed
from sw_transplant.geometry import BranchGeometry, Padding, Size

_HOOKS = {
    "_forward_hooks": "forward hooks",
    "_forward_pre_hooks": "forward pre-hooks (pruning, weight_norm, spectral_norm)",
    "_backward_hooks": "backward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
}


_SETTINGS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def looks_like_conv(module: nn.Module) -> bool:
    """A convolution of PyTorch, or a class with the same attributes."""
    if isinstance(module, _ConvNd):
        return True
    return all(hasattr(module, name) for name in ("in_channels", "out_channels", "kernel_size", "groups", "weight"))


def kernel_of(module: nn.Module) -> tuple[int, ...]:
    """Taps per axis of something that :func:`looks_like_conv`."""
    size: Any = module.kernel_size
    return (size, size) if isinstance(size, int) else tuple(size)


def is_depthwise(module: nn.Module) -> bool:
    """One filter (or several) per input channel, and more than one channel."""
    return bool(module.groups == module.in_channels and module.in_channels > 1)  # type: ignore[operator]


_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_CALLED_BY_OTHERS = (
    "__call__",
    "__getattr__",
    "__setattr__",
    "train",
    "eval",
    "apply",
    "_apply",
    "to",
    "requires_grad_",
    "zero_grad",
    "parameters",
    "named_parameters",
    "state_dict",
    "load_state_dict",
    "_save_to_state_dict",
    "_load_from_state_dict",
)
"""What PyTorch and training code call on modules: a class that overrides one does something that would be lost."""


def interference(module: nn.Module) -> str | None:
    """What else runs, or is relied on, when this module is called: a reason to leave it, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted or traced (TorchScript), so its layers cannot be exchanged; convert before scripting"
    hooks = [what for name, what in _HOOKS.items() if getattr(module, name, None)]
    if hooks:
        return f"it has {' and '.join(hooks)}, which would be lost; remove them before converting"
    if is_parametrized(module):
        return "it has parametrizations; remove them with torch.nn.utils.parametrize.remove_parametrizations first"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (by accelerate, a profiler, ...); undo that before converting"
    return None


def overridden(module: nn.Module) -> str | None:
    """What a module does of its own when PyTorch or training code calls it, which would be lost; None for nothing."""
    for name in _CALLED_BY_OTHERS:
        owner = next(kind for kind in type(module).__mro__ if name in vars(kind))
        if name in module.__dict__ or owner.__module__.partition(".")[0] != "torch":
            return f"{type(module).__name__} has a {name} of its own, which would be lost"
    if any(getattr(module, name, None) for name in _STATE_HOOKS):
        return "it has state_dict hooks, which would be lost; remove them before converting"
    return None


def reason_against(module: nn.Module) -> str | None:
    """Why this layer, which :func:`looks_like_conv`, cannot be replaced; None if it can.

    A large kernel is not asked for here: small parallel branches go through the same rules.
    """
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
        return "it is lazy and has no weights yet; run the model once before converting"
    if reason := interference(module):
        return reason
    if isinstance(module, _ConvTransposeNd):
        return "it is a transposed convolution"
    if len(kernel_of(module)) != 2:
        return f"it is {len(kernel_of(module))}-dimensional (2-dimensional convolutions are supported)"
    if module.in_channels == 1:
        return "it has a single input channel, so that it is an ordinary convolution as much as a depthwise one"
    if not is_depthwise(module):
        return f"groups {module.groups} != in_channels {module.in_channels}: it is not depthwise"
    if not isinstance(module, nn.Conv2d):
        return f"class {type(module).__name__} is not an nn.Conv2d; what its forward does is not known"
    if module.padding_mode != "zeros":
        return f"padding_mode {module.padding_mode!r} is not supported (zeros is)"
    for name in ("weight", "bias"):
        if module._parameters.get(name) is None and getattr(module, name, None) is not None:
            return f"its {name} is computed or a buffer, not a parameter, and would be fixed at what it is now"
    if name := next((name for name in _SETTINGS if name not in module.__dict__), ""):
        return f"class {type(module).__name__} computes its {name}, which would be fixed at what it is now"
    if reason := overridden(module) or switches(module):
        return reason
    if not module.weight.is_floating_point():
        return f"weights of dtype {module.weight.dtype} are not supported (floating-point ones are)"
    if not has_own_forward(module):
        return None
    if (inputs := len(inspect.signature(module.forward).parameters)) != 1:
        return f"the forward of class {type(module).__name__} takes {inputs} inputs"
    try:
        probe_padding(module)
    except ValueError as reason_:
        return f"class {type(module).__name__} has a forward of its own, and {reason_}"
    return None


def has_own_forward(module: nn.Conv2d) -> bool:
    """Whether its class computes something that is not known from nn.Conv2d: :mod:`proof` tells."""
    kind = type(module)
    return kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward


def conv_geometry(module: nn.Conv2d) -> BranchGeometry:
    """Kernel, padding and dilation of a layer that passed :func:`reason_against`."""
    kernel, dilation = (module.kernel_size[0], module.kernel_size[1]), (module.dilation[0], module.dilation[1])
    if has_own_forward(module):
        return BranchGeometry(kernel, probe_padding(module), dilation)
    return BranchGeometry(kernel, static_padding(module.padding, kernel, dilation), dilation)


def static_padding(padding: int | str | tuple[int, ...], kernel: Size, dilation: Size) -> Padding:
    """A padding argument as ``(top, bottom, left, right)``: a number, a pair, four sides, ``"same"``, ``"valid"``."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":  # PyTorch allows it for stride 1 only, where it does not depend on the map
        return BranchGeometry(kernel, "same", dilation).resolve((1, 1), (1, 1))
    if not isinstance(padding, int) and len(padding) == 4:
        return tuple(padding)  # type: ignore[return-value]
    vertical, horizontal = (padding, padding) if isinstance(padding, int) else (padding[0], padding[-1])  # type: ignore[index]
    return (vertical, vertical, horizontal, horizontal)  # type: ignore[return-value]


def probe_padding(module: nn.Conv2d) -> Padding:
    """The padding of a convolution class with its own forward: what it must be if it is a convolution at all.

    Covers classes that pad by themselves (timm's ``Conv2dSame``, the published ``DepthWiseConv2dImplicitGEMM``, whose
    ``padding`` says 0): a copy runs on random maps of several sizes beside the plain convolution with its weights and
    the padding ``"same"``, then with the one that the module states. A proposal: :mod:`proof` tests it.

    Raises:
        ValueError: neither agrees, or the module cannot be run; the message says which.
    """
    if module.weight.is_meta:
        raise ValueError("it has no values (meta device), so that it cannot be tried")
    kernel, dilation = (module.kernel_size[0], module.kernel_size[1]), (module.dilation[0], module.dilation[1])
    stride = (module.stride[0], module.stride[1])
    candidates = {BranchGeometry(kernel, "same", dilation): None}
    if not isinstance(module.padding, str):
        candidates[BranchGeometry(kernel, static_padding(module.padding, kernel, dilation), dilation)] = None
    failure = ""
    with undisturbed(module), torch.no_grad():
        for geometry in candidates:
            try:
                twin = copy.deepcopy(module).eval()
                if all(_agrees(twin, geometry, stride, extra) for extra in (0, 1, 6)):
                    return geometry.padding
            except Exception as error:  # a foreign forward may fail in any way
                failure = told(error)
    if failure:
        raise ValueError(f"cannot be run alone: {failure}")
    raise ValueError("gives another output than the convolution that its attributes describe")


def _agrees(module: nn.Conv2d, geometry: BranchGeometry, stride: Size, extra: int) -> bool:
    least = [max(3, 3 * step - grown) for step, grown in zip(stride, geometry.growth, strict=True)]  # a few outputs
    size = (least[0] + extra, least[1] + 1 + extra)
    generator = torch.Generator().manual_seed(extra)
    x = torch.randn(2, module.in_channels, *size, generator=generator, device="cpu").to(module.weight)
    top, bottom, left, right = geometry.resolve(size, stride)
    padded = F.pad(x, (left, right, top, bottom))
    expected = F.conv2d(padded, module.weight, module.bias, stride, 0, geometry.dilation, module.groups)
    got = module(x)
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
        return False
    bound = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 1e-2
    return bool((got - expected).float().norm() <= bound * expected.float().norm())
