"""Private copies of a site for the proof: random values, and few channels where all channels are alike."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

FEW = 4
"""Channels of a narrow copy."""


def private_copy(site: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with random values: what holds for them does not hold by chance, or because kernels are zero."""
    twin = copy.deepcopy(site).to(dtype)
    device = next(twin.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def draw(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)

    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.requires_grad_(True)
            taps = max(parameter[0].numel(), 1) if parameter.dim() else 1
            parameter.copy_(draw(parameter.shape) / taps**0.5)
        for module in twin.modules():
            if isinstance(module, _BatchNorm):
                if isinstance(module, nn.SyncBatchNorm):
                    module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]  # it would wait for other processes
                if module.running_mean is not None:
                    module.running_mean.copy_(0.3 * draw(module.running_mean.shape))
                if module.running_var is not None:
                    module.running_var.copy_(draw(module.running_var.shape).abs() + 0.5)
                if module.weight is not None:
                    module.weight.abs_().add_(0.5)
    return twin


def narrowed(original: nn.Module, in_channels: int) -> nn.Module | None:
    """A copy with the first few channels only, for what runs many times; None where channels may differ in kind.

    They are alike where every tensor belongs to a convolution or BatchNorm of PyTorch's own, one filter or number per
    channel.
    """
    if in_channels <= FEW:
        return None
    twin = copy.deepcopy(original)
    for module in twin.modules():
        if type(module) is nn.Conv2d:
            filters = FEW * module.out_channels // module.in_channels
            module.in_channels = module.groups = FEW
            module.out_channels = filters
        elif isinstance(module, _BatchNorm):
            filters = FEW * module.num_features // in_channels
            module.num_features = filters
        elif module._parameters or module._buffers:
            return None
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach()[:filters].clone())
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dim():
                module._buffers[name] = buffer[:filters].clone()
    return twin
