"""UniRepLKNet: 13 × 13 depthwise kernels with dilated small kernels in parallel (Ding et al., CVPR 2024)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from torch import nn

from sw_transplant.models.large_kernel import depthwise
from sw_transplant.models.registry import build, preprocessing
from sw_transplant.models.staged import StagedNet, drop_path_rates, require_stages

__all__ = ["UniRepLKNet"]

# Kernel size and dilation of the branches beside a large kernel; the published sizes use 13.
DILATED_BRANCHES = {
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
SMALL_KERNELS = (3, 5)


class DilatedReparamBlock(nn.Module):
    """Sum of a large depthwise convolution and dilated small ones of the same input, each with its BatchNorm."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.lk_origin = depthwise(channels, (kernel_size, kernel_size))
        self.origin_bn = nn.BatchNorm2d(channels)
        self.branches = DILATED_BRANCHES[kernel_size]
        for size, dilation in self.branches:
            self.add_module(f"dil_conv_k{size}_{dilation}", depthwise(channels, (size, size), dilation))
            self.add_module(f"dil_bn_k{size}_{dilation}", nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        out = self.origin_bn(self.lk_origin(x))
        for size, dilation in self.branches:
            conv = getattr(self, f"dil_conv_k{size}_{dilation}")
            bn = getattr(self, f"dil_bn_k{size}_{dilation}")
            out = out + bn(conv(x))
        return out


class SEBlock(nn.Module):
    """Squeeze and excitation: scale every channel by a gate computed from the pooled channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, kernel_size=1)
        self.relu = nn.ReLU()
        self.up = nn.Conv2d(channels // 4, channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.up(self.relu(self.down(x.mean((2, 3), keepdim=True))))  # (B, C, 1, 1)
        return x * gate.sigmoid()


class GRN(nn.Module):
    """Global response normalisation of a channels-last map (B, H, W, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        energy = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)  # (B, 1, 1, C)
        response = energy / (energy.mean(dim=-1, keepdim=True) + 1e-6)
        return x * (1 + self.gamma * response) + self.beta


class Permute(nn.Module):
    """`torch.permute` as a layer; it holds the place that a permutation has in the published Sequentials."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(self.order)


def _spatial_layer(channels: int, kernel_size: int) -> nn.Module:
    if kernel_size in SMALL_KERNELS:
        return depthwise(channels, (kernel_size, kernel_size))
    if kernel_size in DILATED_BRANCHES:
        return DilatedReparamBlock(channels, kernel_size)
    known = sorted((*SMALL_KERNELS, *DILATED_BRANCHES))
    raise ValueError(f"UniRepLKNet: kernel size {kernel_size} in kernel_sizes is not one of {known}")


class UniRepLKNetBlock(nn.Module):
    """Depthwise layer, BatchNorm, squeeze and excitation, a perceptron with GRN, layer scale, residual."""

    SPATIAL: ClassVar[str] = "dwconv"
    """What the depthwise layer is called in the checkpoints."""

    def __init__(self, dim: int, spatial: nn.Module, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        setattr(self, self.SPATIAL, spatial)
        self.norm = nn.BatchNorm2d(dim)
        self.se = SEBlock(dim)
        self.pwconv1 = nn.Sequential(Permute(0, 2, 3, 1), nn.Linear(dim, 4 * dim))
        self.act = nn.Sequential(nn.GELU(), GRN(4 * dim))
        self.pwconv2 = nn.Sequential(nn.Linear(4 * dim, dim, bias=False), Permute(0, 3, 1, 2), nn.BatchNorm2d(dim))
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim)) if layer_scale > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        """What the perceptron takes: the depthwise layer, normalised, gated."""
        return self.se(self.norm(getattr(self, self.SPATIAL)(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.pwconv2(self.act(self.pwconv1(self.mixed(x))))
        if self.gamma is not None:
            y = self.gamma.view(1, -1, 1, 1) * y
        return x + self.drop_path(y)


def overlapping_entrances(in_chans: int, dims: Sequence[int]) -> nn.ModuleList:
    """The stem and the downsampling layers: 3 x 3 convolutions of stride 2, each with a LayerNorm."""
    half = dims[0] // 2
    stem = nn.Sequential(
        nn.Conv2d(in_chans, half, kernel_size=3, stride=2, padding=1),
        LayerNorm2d(half, eps=1e-6),
        nn.GELU(),
        nn.Conv2d(half, dims[0], kernel_size=3, stride=2, padding=1),
        LayerNorm2d(dims[0], eps=1e-6),
    )
    layers = nn.ModuleList([stem])
    for narrow, wide in pairwise(dims):
        halving = nn.Conv2d(narrow, wide, kernel_size=3, stride=2, padding=1)
        layers.append(nn.Sequential(halving, LayerNorm2d(wide, eps=1e-6)))
    return layers


class UniRepLKNet(StagedNet):
    """UniRepLKNet in training form, with the parameter names and shapes of its published checkpoints.

    See UniRepLKNet, Section 3.2, for the block and Table 1 there for the sizes.

    Args:
        in_chans: channels of the input image.
        num_classes: outputs of the classifier; 0 for none.
        depths: blocks of the four stages.
        dims: channels of the four stages; the first must be even, and all must be at least 4.
        kernel_sizes: kernel size of every block, stage by stage; 3, 5 or an odd number from 7 to 17.
        drop_path_rate: stochastic depth of the last block; the others rise to it linearly.
        layer_scale_init_value: initial layer scale; none if not positive.
        head_init_scale: factor on the classifier's initial weights.
        global_pool: 'avg', 'max', 'avgmax', or '' without classifier.
        drop_rate: dropout in front of the classifier.

    Raises:
        ValueError: if the settings do not fit each other or a kernel size is not supported.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 3, 18, 3),
        dims: Sequence[int] = (80, 160, 320, 640),
        kernel_sizes: Sequence[Sequence[int]] = ((3,) * 3, (13,) * 3, (13, 3) * 9, (13,) * 3),
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        require_stages("UniRepLKNet", depths=depths, dims=dims, kernel_sizes=kernel_sizes)
        if [len(sizes) for sizes in kernel_sizes] != list(depths):
            raise ValueError(
                f"UniRepLKNet: kernel_sizes has {[len(sizes) for sizes in kernel_sizes]} entries, "
                f"expected one per block, {list(depths)} as in depths"
            )
        super().__init__(dims, in_chans, drop_rate)

        self.downsample_layers = overlapping_entrances(in_chans, dims)
        self.stages = nn.ModuleList()
        for dim, sizes, rates in zip(dims, kernel_sizes, drop_path_rates(drop_path_rate, depths), strict=True):
            blocks = [
                UniRepLKNetBlock(dim, _spatial_layer(dim, size), rate, layer_scale_init_value)
                for size, rate in zip(sizes, rates, strict=True)
            ]
            self.stages.append(nn.Sequential(*blocks))

        self._finish(dims, num_classes, global_pool, head_init_scale)


# The published B, L and XL were fine-tuned at 384, the others trained at 224.
INPUT_SIZES = {"a": 224, "f": 224, "p": 224, "n": 224, "t": 224, "s": 224, "b": 384, "l": 384, "xl": 384}
default_cfgs = generate_default_cfgs(
    {f"unireplknet_{name}": preprocessing("downsample_layers.0.0", size) for name, size in INPUT_SIZES.items()}
)


def _geometry(width: int, depths: Sequence[int], pattern: Sequence[int]) -> dict[str, Any]:
    """A published size: `width` doubles from stage to stage, and `pattern` repeats over the kernels of the third."""
    repeated = tuple(pattern) * (depths[2] // len(pattern))
    return {
        "depths": depths,
        "dims": tuple(width * 2**stage for stage in range(4)),
        "kernel_sizes": ((3,) * depths[0], (13,) * depths[1], repeated, (13,) * depths[3]),
    }


@register_model
def unireplknet_a(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-A, 4.6 M parameters."""
    return build(UniRepLKNet, "unireplknet_a", pretrained, _geometry(40, (2, 2, 6, 2), (13,)), **kwargs)


@register_model
def unireplknet_f(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-F, 6.5 M parameters."""
    return build(UniRepLKNet, "unireplknet_f", pretrained, _geometry(48, (2, 2, 6, 2), (13,)), **kwargs)


@register_model
def unireplknet_p(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-P, 11.1 M parameters."""
    return build(UniRepLKNet, "unireplknet_p", pretrained, _geometry(64, (2, 2, 6, 2), (13,)), **kwargs)


@register_model
def unireplknet_n(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-N, 18.8 M parameters."""
    return build(UniRepLKNet, "unireplknet_n", pretrained, _geometry(80, (2, 2, 8, 2), (13,)), **kwargs)


@register_model
def unireplknet_t(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-T, 31.7 M parameters."""
    return build(UniRepLKNet, "unireplknet_t", pretrained, _geometry(80, (3, 3, 18, 3), (13, 3)), **kwargs)


@register_model
def unireplknet_s(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-S, 56.5 M parameters."""
    return build(UniRepLKNet, "unireplknet_s", pretrained, _geometry(96, (3, 3, 27, 3), (13, 3, 3)), **kwargs)


@register_model
def unireplknet_b(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-B, 99.1 M parameters."""
    return build(UniRepLKNet, "unireplknet_b", pretrained, _geometry(128, (3, 3, 27, 3), (13, 3, 3)), **kwargs)


@register_model
def unireplknet_l(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-L, 220.1 M parameters."""
    return build(UniRepLKNet, "unireplknet_l", pretrained, _geometry(192, (3, 3, 27, 3), (13, 3, 3)), **kwargs)


@register_model
def unireplknet_xl(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-XL, 388.7 M parameters."""
    return build(UniRepLKNet, "unireplknet_xl", pretrained, _geometry(256, (3, 3, 27, 3), (13, 3, 3)), **kwargs)
