"""Which convolutions can be replaced, and why another cannot: rules for a single layer.

A layer passes when everything that its call does is known: nn.Conv2d's own forward, zero padding, no hooks, no
parametrization. A class with a forward of its own is run beside the plain convolution that its attributes describe, and
passes when the two agree (:func:`probe_padding`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from sw_transplant.geometry import BranchGeometry, Padding, Size

_HOOKS = {
    "_forward_hooks": "forward hooks",
    "_forward_pre_hooks": "forward pre-hooks (pruning, weight_norm, spectral_norm)",
    "_backward_hooks": "backward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
}


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
    if not is_depthwise(module):
        return f"groups {module.groups} != in_channels {module.in_channels}: it is not depthwise"
    if not isinstance(module, nn.Conv2d):
        return f"class {type(module).__name__} is not an nn.Conv2d; what its forward does is not known"
    if module.padding_mode != "zeros":
        return f"padding_mode {module.padding_mode!r} is not supported (zeros is)"
    if not module.weight.is_floating_point():
        return f"weights of dtype {module.weight.dtype} are not supported (floating-point ones are)"
    if not _has_own_forward(module):
        return None
    if probe_padding(module) is None:
        return (
            f"class {type(module).__name__} has a forward of its own, and gives another output than the convolution "
            "that its attributes describe"
        )
    return None


def _has_own_forward(module: nn.Conv2d) -> bool:
    kind = type(module)
    return kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward


def conv_geometry(module: nn.Conv2d) -> BranchGeometry:
    """Kernel, padding and dilation of a layer that passed :func:`reason_against`."""
    kernel, dilation = (module.kernel_size[0], module.kernel_size[1]), (module.dilation[0], module.dilation[1])
    if _has_own_forward(module):
        padding = probe_padding(module)
        if padding is None:
            raise ValueError(
                f"class {type(module).__name__}: its forward is not a plain convolution; see reason_against"
            )
        return BranchGeometry(kernel, padding, dilation)
    return BranchGeometry(kernel, static_padding(module.padding, kernel, dilation), dilation)


def static_padding(padding: int | str | tuple[int, ...], kernel: Size, dilation: Size) -> Padding:
    """PyTorch's padding argument (a number, a pair, ``"same"``, ``"valid"``) as ``(top, bottom, left, right)``."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":  # PyTorch allows it for stride 1 only, where it does not depend on the map
        return BranchGeometry(kernel, "same", dilation).resolve((1, 1), (1, 1))
    vertical, horizontal = (padding, padding) if isinstance(padding, int) else (padding[0], padding[-1])  # type: ignore[index]
    return (vertical, vertical, horizontal, horizontal)  # type: ignore[return-value]


def probe_padding(module: nn.Conv2d) -> Padding | None:
    """Runs a convolution class with its own forward beside the plain convolution with its weights.

    Covers classes that pad by themselves (timm's ``Conv2dSame``, the published ``DepthWiseConv2dImplicitGEMM``, whose
    ``padding`` says 0): the padding ``"same"`` is tried, then the one that the module states.

    Returns:
        The padding with which both agree on random maps of several sizes, in train and in eval mode; None where
        neither does, or where the module cannot be run (the meta device).
    """
    weight = module.weight
    if weight.is_meta:
        return None
    kernel, dilation = (module.kernel_size[0], module.kernel_size[1]), (module.dilation[0], module.dilation[1])
    stride = (module.stride[0], module.stride[1])
    candidates = {BranchGeometry(kernel, "same", dilation): None}
    if not isinstance(module.padding, str):
        candidates[BranchGeometry(kernel, static_padding(module.padding, kernel, dilation), dilation)] = None
    twin = copy.deepcopy(module)
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []), torch.no_grad():
        for geometry in candidates:
            if all(_agrees(twin.train(mode), geometry, stride, extra) for mode in (True, False) for extra in (0, 1, 6)):
                return geometry.padding
    return None


def _agrees(module: nn.Conv2d, geometry: BranchGeometry, stride: Size, extra: int) -> bool:
    reach = geometry.reach
    size = (reach[0] + 2 + extra, reach[1] + 3 + extra)
    generator = torch.Generator().manual_seed(extra)
    x = torch.randn(2, module.in_channels, *size, generator=generator).to(module.weight)
    top, bottom, left, right = geometry.resolve(size, stride)
    padded = F.pad(x, (left, right, top, bottom))
    expected = F.conv2d(padded, module.weight, module.bias, stride, 0, geometry.dilation, module.groups)
    try:
        got = module(x)
    except Exception:  # a foreign forward may fail in any way: then it does not agree
        return False
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
        return False
    bound = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 1e-2
    return bool((got - expected).float().norm() <= bound * expected.float().norm())
