"""Back to plain convolutions, for deployment and export."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sw_transplant.forms import DenseKernel
from sw_transplant.geometry import BranchGeometry
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.surgery.hosts import hosts_of


def merge(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Turns every Shiftwise module into plain depthwise ``nn.Conv2d``, BatchNorm folded; the same function in eval.

    What was one convolution becomes one again, of the original kernel size and, without BatchNorm, with the original
    weights bit for bit. Parallel branches are added up wherever that costs no work; what is left beside each other (the
    two strips of SLaK, whose sum would be a 51 x 51) becomes a :class:`ParallelConv2d`. Zero padding that differs from
    side to side becomes an ``nn.ZeroPad2d`` before the convolution, one that depends on the map a :class:`SameConv2d`.

    Args:
        model: a converted model.
        inplace: change ``model`` itself instead of a deep copy.

    Returns:
        The merged model: a copy, or with ``inplace`` the model itself; where it is a Shiftwise module, its replacement.

    Raises:
        ValueError: there is no Shiftwise module in the model.
        NotImplementedError: a BatchNorm keeps no running statistics that could be folded.
    """
    target = model if inplace else copy.deepcopy(model)
    merged = {module: _plain(module) for module in target.modules() if isinstance(module, ShiftwiseConv2d)}
    if not merged:
        raise ValueError(f"merge: {type(model).__name__} has no Shiftwise module, expected a model from convert(model)")
    if isinstance(target, ShiftwiseConv2d):
        return merged[target]
    paths = {module: path for path, module in target.named_modules()}
    strange = [paths[module] for module, plain in merged.items() if not _is_what_it_replaced(module, plain)]
    for parent in list(target.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, ShiftwiseConv2d):
                parent._modules[name] = merged[child]
    for host in hosts_of(target):
        host.follow(target, strange)
    return target


class ParallelConv2d(nn.ModuleList):
    """The sum of plain convolutions of one input: ``(B, C_in, H, W)`` to ``(B, C_out, H', W')``."""

    def forward(self, x: Tensor) -> Tensor:
        maps = [convolution(x) for convolution in self]  # said so that TorchScript understands it
        y = maps[0]
        for other in maps[1:]:
            y = y + other
        return y


class ChannelOrder(nn.Module):
    """Channel k of the output is channel ``order[k]`` of the input: ``(B, C, H, W)`` to the same."""

    order: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.order)


class SameConv2d(nn.Conv2d):
    """nn.Conv2d whose output has ceil(size / stride) rows and columns; the odd zero of padding comes after the map."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, dilation = (self.kernel_size[0], self.kernel_size[1]), (self.dilation[0], self.dilation[1])
        geometry = BranchGeometry(kernel, "same", dilation)
        top, bottom, left, right = geometry.resolve((x.shape[-2], x.shape[-1]), (self.stride[0], self.stride[1]))
        return super().forward(F.pad(x, (left, right, top, bottom)))


@torch.no_grad()
def _plain(module: ShiftwiseConv2d) -> nn.Module:
    kernels, bias = module.kernels()
    parts = [_convolution(module, kernel, bias if i == 0 else None) for i, kernel in enumerate(kernels)]
    plain = parts[0] if len(parts) == 1 else ParallelConv2d(parts)
    if module.channel_order is not None:
        plain = nn.Sequential(ChannelOrder(module.channel_order), plain)
    plain.requires_grad_(any(parameter.requires_grad for parameter in module.parameters()))
    return plain.train(module.training)


def _is_what_it_replaced(module: ShiftwiseConv2d, plain: nn.Module) -> bool:
    """Whether the weights of the merged layer have the names and shapes of those that the layer took the place of."""
    if module.match is None or any(source.bn is not None for source in module.match.branches):
        return False
    expected: dict[str, tuple[int, ...]] = {}
    for source in module.match.branches:
        if source.weight is not None:
            expected[source.weight] = (module.out_channels, 1, *source.geometry.kernel_size)
        if source.bias is not None:
            expected[source.bias] = (module.out_channels,)
    return {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()} == expected


def _convolution(module: ShiftwiseConv2d, kernel: DenseKernel, bias: Tensor | None) -> nn.Module:
    growth = module.growth
    (top, left), (kh, kw), (dh, dw) = kernel.extent.origin, kernel.extent.kernel_size, kernel.extent.dilation
    bottom, right = growth[0] + dh * (kh - 1) - top, growth[1] + dw * (kw - 1) - left
    dynamic = module.padding == "same"
    symmetric = (top, left) == (bottom, right)
    convolution = (SameConv2d if dynamic else nn.Conv2d)(
        module.in_channels,
        module.out_channels,
        (kh, kw),
        stride=module.stride,
        padding=(top, left) if symmetric and not dynamic else 0,
        dilation=(dh, dw),
        groups=module.groups,
        bias=bias is not None,
        device="meta",
    )
    convolution.weight = nn.Parameter(kernel.weight.detach().clone())
    if bias is not None:
        convolution.bias = nn.Parameter(bias.detach().clone())
    if symmetric or dynamic:
        return convolution
    # Negative numbers cut the map: a kernel that was enclosed in a larger one may start inside it.
    return nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), convolution)
