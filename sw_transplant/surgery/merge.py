"""Back to plain convolutions, for deployment and export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sw_transplant.find.keep import give_back_attributes
from sw_transplant.forms import DenseKernel
from sw_transplant.geometry import BranchGeometry, FilledGeometry, Size
from sw_transplant.layers.parameters import take_attributes
from sw_transplant.layers.shiftwise_conv2d import STRANGE, ShiftwiseConv2d
from sw_transplant.surgery.copies import operand
from sw_transplant.surgery.hosts import hosts_of

Sides = tuple[int, int, int, int]
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def merge(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Turns every Shiftwise module into plain depthwise ``nn.Conv2d``, BatchNorm folded; the same function in eval.

    What was one convolution becomes one again, of the original kernel size and, without BatchNorm, with the original
    weights bit for bit. Parallel branches are added up wherever that costs no work; what is left beside each other (the
    two strips of SLaK, whose sum would be a 51 x 51) becomes a :class:`ParallelConv2d`. Zero padding that differs from
    side to side becomes ``padding="same"`` or an :class:`UnevenConv2d`, one that depends on the map a
    :class:`SameConv2d`; ``padding`` is as it was written before the conversion. What weights and biases require of
    gradients, attributes of parameters and flags on layers are kept. Under autocast, an input that a sum adds is
    rounded with the kernel that it went into; before merging it is not.

    Args:
        model: a converted model.
        inplace: change ``model`` itself instead of a deep copy.

    Returns:
        The merged model: a copy, or with ``inplace`` the model itself; where it is a Shiftwise module, its replacement.

    Raises:
        ValueError: there is no Shiftwise module in the model.
        NotImplementedError: a BatchNorm keeps no running statistics that could be folded.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"merge: got {type(model).__name__}, expected a model from convert(model)")
    target = operand(model, inplace=inplace)
    merged = {module: _plain(module) for module in target.modules() if isinstance(module, ShiftwiseConv2d)}
    if not merged:
        raise ValueError(f"merge: {type(model).__name__} has no Shiftwise module, expected a model from convert(model)")
    if isinstance(target, ShiftwiseConv2d):
        return merged[target]
    for module, plain in merged.items():
        if not _is_what_it_replaced(module, plain):
            plain.__dict__[STRANGE] = True
    for parent in list(target.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, ShiftwiseConv2d):
                parent._modules[name] = merged[child]
    for host in hosts_of(target):
        host.follow(target)
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
    """nn.Conv2d whose output has ceil(size / stride) rows and columns; the odd zero of padding comes after the map.

    Attributes:
        filling: rows and columns at the end of the kernel that do not count for the padding.
    """

    filling: Size = (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        kernel, dilation = (self.kernel_size[0], self.kernel_size[1]), (self.dilation[0], self.dilation[1])
        geometry = FilledGeometry(kernel, "same", dilation, self.filling)
        top, bottom, left, right = geometry.resolve((x.shape[-2], x.shape[-1]), (self.stride[0], self.stride[1]))
        return super().forward(F.pad(x, (left, right, top, bottom)))


class UnevenConv2d(nn.Conv2d):
    """nn.Conv2d with another number of zeros on each side of the map.

    Args:
        channels: of the input and of the output; depthwise.
        kernel_size, stride, dilation: as in nn.Conv2d.
        padding: ``(top, bottom, left, right)``, at least 0 each.
        bias: whether there is one.
    """

    def __init__(
        self, channels: Size, kernel_size: Size, *, stride: Size, padding: Sides, dilation: Size, bias: bool
    ) -> None:
        options = {"stride": stride, "dilation": dilation, "bias": bias, "groups": channels[0], "device": "meta"}
        super().__init__(*channels, kernel_size, **options)  # type: ignore[arg-type]
        self.padding = padding
        top, bottom, left, right = padding
        self.margins = [left, right, top, bottom]  # as torch.nn.functional.pad takes them

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(input, self.margins), weight, bias, self.stride, (0, 0), self.dilation, self.groups)


@torch.no_grad()
def _plain(module: ShiftwiseConv2d) -> nn.Module:
    (kernels, bias), (trained, bias_trained) = module.kernels(), module.trained()
    banks: Sequence[Tensor] = () if module.spec is not None else [b.bank for b in module.parts() if not b.is_identity]
    parts = []
    for i, kernel in enumerate(kernels):
        convolution = _empty_convolution(module, kernel, bias=bias is not None and i == 0)
        convolution.weight = nn.Parameter(kernel.weight.detach().clone(), requires_grad=trained[i])
        if banks:
            take_attributes(convolution.weight, banks)
        if convolution.bias is not None and bias is not None:
            convolution.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias_trained)
            if isinstance(bias, nn.Parameter):
                take_attributes(convolution.bias, [bias])
        parts.append(convolution)
    plain: nn.Module = parts[0] if len(parts) == 1 else ParallelConv2d(parts)
    if module.channel_order is not None:
        plain = nn.Sequential(ChannelOrder(module.channel_order), plain)
    give_back_attributes(plain, module)
    for name in _HOOKS:  # those that somebody put on the layer after the conversion
        getattr(plain, name).update(getattr(module, name))
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


def _empty_convolution(module: ShiftwiseConv2d, kernel: DenseKernel, *, bias: bool) -> nn.Conv2d:
    """A convolution with the geometry of a kernel, without values; ``padding`` as it was written, where that is it."""
    channels, stride = (module.in_channels, module.out_channels), module.stride
    size, dilation, sides = kernel.extent.kernel_size, kernel.extent.dilation, _sides(module, kernel)
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "bias": bias}
    plainly = {**options, "groups": module.groups, "device": "meta"}
    if module.pads_by_map:
        convolution = SameConv2d(*channels, size, **plainly)
        if isinstance(module._geometry, FilledGeometry):
            convolution.filling = module._geometry.filling
        return convolution
    even = sides[0] == sides[1] and sides[2] == sides[3]
    is_same = stride == (1, 1) and sides == BranchGeometry(size, "same", dilation).resolve((1, 1), stride)
    if is_same and (module.stated_padding == "same" or not even):
        return nn.Conv2d(*channels, size, padding="same", **plainly)
    if not any(sides) and module.stated_padding == "valid":
        return nn.Conv2d(*channels, size, padding="valid", **plainly)
    if even:
        return nn.Conv2d(*channels, size, padding=(sides[0], sides[2]), **plainly)
    return UnevenConv2d(channels, size, padding=sides, **options)


def _sides(module: ShiftwiseConv2d, kernel: DenseKernel) -> Sides:
    """Zeros ``(top, bottom, left, right)`` around the map."""
    growth = module.growth
    (top, left), (kh, kw), (dh, dw) = kernel.extent.origin, kernel.extent.kernel_size, kernel.extent.dilation
    return top, growth[0] + dh * (kh - 1) - top, left, growth[1] + dw * (kw - 1) - left
