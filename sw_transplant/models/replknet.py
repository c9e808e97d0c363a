"""RepLKNet: depthwise kernels up to 31 × 31 with a 5 × 5 kernel in parallel (Ding et al., CVPR 2022)."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers.drop import DropPath
from timm.models import generate_default_cfgs, register_model
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import nn

from sw_transplant.models.large_kernel import ReparamLargeKernelConv, conv_bn
from sw_transplant.models.registry import build, preprocessing
from sw_transplant.models.staged import StagedNet, drop_path_rates, require_stages

__all__ = ["RepLKNet"]


def _pointwise(in_channels: int, out_channels: int) -> nn.Sequential:
    return conv_bn(nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False))


def _pointwise_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    layer = _pointwise(in_channels, out_channels)
    layer.add_module("relu", nn.ReLU())
    return layer


def _conv3x3_relu(in_channels: int, out_channels: int, stride: int, groups: int = 1) -> nn.Sequential:
    layer = conv_bn(nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, groups=groups, bias=False))
    layer.add_module("relu", nn.ReLU())
    return layer


class RepLKBlock(nn.Module):
    """A large depthwise kernel between two pointwise convolutions, residual."""

    def __init__(self, channels: int, inner: int, branches: dict[str, tuple[int, int]], drop_path: float) -> None:
        super().__init__()
        self.pw1 = _pointwise_relu(channels, inner)
        self.pw2 = _pointwise(inner, channels)
        self.large_kernel = ReparamLargeKernelConv(inner, branches)
        self.lk_relu = nn.ReLU()
        self.prelkb_bn = nn.BatchNorm2d(channels)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.large_kernel(self.pw1(self.prelkb_bn(x)))
        return x + self.drop_path(self.pw2(self.lk_relu(y)))


class ConvFFN(nn.Module):
    """Two pointwise convolutions with a GELU between, residual."""

    def __init__(self, channels: int, inner: int, drop_path: float) -> None:
        super().__init__()
        self.preffn_bn = nn.BatchNorm2d(channels)
        self.pw1 = _pointwise(channels, inner)
        self.act = nn.GELU()
        self.pw2 = _pointwise(inner, channels)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path(self.pw2(self.act(self.pw1(self.preffn_bn(x)))))


class RepLKNet(StagedNet):
    """RepLKNet in training form, with the names and shapes of its published checkpoints (RepLKNet, Section 4.1).

    Args:
        large_kernel_sizes: kernel size of the four stages.
        layers: pairs of RepLKBlock and ConvFFN in the four stages.
        channels: channels of the four stages.
        small_kernel: kernel size of the parallel small branch; None for none.
        in_chans: channels of the input image.
        num_classes: outputs of the classifier; 0 for none.
        dw_ratio: channels of the depthwise layer per channel of the stage.
        ffn_ratio: hidden channels of ConvFFN per channel of the stage.
        drop_path_rate: stochastic depth of the last pair; the others rise to it linearly.
        global_pool: 'avg', 'max', 'avgmax', or '' without classifier.
        drop_rate: dropout in front of the classifier.

    Raises:
        ValueError: if a setting does not have four entries or a kernel is even.
    """

    def __init__(
        self,
        large_kernel_sizes: Sequence[int] = (31, 29, 27, 13),
        layers: Sequence[int] = (2, 2, 18, 2),
        channels: Sequence[int] = (128, 256, 512, 1024),
        small_kernel: int | None = 5,
        in_chans: int = 3,
        num_classes: int = 1000,
        dw_ratio: float = 1.0,
        ffn_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        require_stages("RepLKNet", large_kernel_sizes=large_kernel_sizes, layers=layers, channels=channels)
        super().__init__(channels, in_chans, drop_rate)

        base = channels[0]
        self.stem = nn.Sequential(
            _conv3x3_relu(in_chans, base, stride=2),
            _conv3x3_relu(base, base, stride=1, groups=base),
            _pointwise_relu(base, base),
            _conv3x3_relu(base, base, stride=2, groups=base),
        )
        self.stages = nn.ModuleList()
        for width, size, rates in zip(
            channels, large_kernel_sizes, drop_path_rates(drop_path_rate, layers), strict=True
        ):
            branches = {"lkb_origin": (size, size)}
            if small_kernel is not None:
                branches["small_conv"] = (small_kernel, small_kernel)
            blocks: list[nn.Module] = []
            for rate in rates:
                blocks.append(RepLKBlock(width, int(width * dw_ratio), branches, rate))
                blocks.append(ConvFFN(width, int(width * ffn_ratio), rate))
            self.stages.append(nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks))))
        self.transitions = nn.ModuleList(
            nn.Sequential(_pointwise_relu(narrow, wide), _conv3x3_relu(wide, wide, stride=2, groups=wide))
            for narrow, wide in pairwise(channels)
        )
        self.norm = nn.BatchNorm2d(channels[-1])
        self.reset_classifier(num_classes, global_pool)

    def entrances(self) -> list[nn.Module]:
        return [self.stem, *self.transitions]

    def blocks(self, stage: int) -> nn.Module:
        return self.stages[stage].get_submodule("blocks")

    def keep_stages(self, count: int) -> None:
        self.stages = self.stages[:count]
        self.transitions = self.transitions[: count - 1]

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        # BatchNorm takes its statistics over the map: in training, normalising after pooling would be another function.
        return self.global_pool(self.norm(x))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        fine = [
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^transitions\.(\d+)", MATCH_PREV_GROUP),
            (r"^norm", MATCH_PREV_GROUP),
        ]
        return {"stem": r"^stem", "blocks": r"^(?:stages|transitions)\.(\d+)" if coarse else fine}


default_cfgs = generate_default_cfgs(
    {
        "replknet_31b": preprocessing("stem.0.conv"),
        "replknet_31l": preprocessing("stem.0.conv", size=384),
        "replknet_xl": preprocessing("stem.0.conv", size=320, mean=IMAGENET_INCEPTION_MEAN, std=IMAGENET_INCEPTION_STD),
    }
)


@register_model
def replknet_31b(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """RepLKNet-31B, 79.9 M parameters."""
    return build(RepLKNet, "replknet_31b", pretrained, {"channels": (128, 256, 512, 1024)}, **kwargs)


@register_model
def replknet_31l(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """RepLKNet-31L, 172.7 M parameters."""
    return build(RepLKNet, "replknet_31l", pretrained, {"channels": (192, 384, 768, 1536)}, **kwargs)


@register_model
def replknet_xl(pretrained: bool = False, **kwargs: Any) -> RepLKNet:
    """RepLKNet-XL, 335.4 M parameters: smaller kernels, wider depthwise layers, no small branch."""
    geometry = {
        "large_kernel_sizes": (27, 27, 27, 13),
        "channels": (256, 512, 1024, 2048),
        "small_kernel": None,
        "dw_ratio": 1.5,
    }
    return build(RepLKNet, "replknet_xl", pretrained, geometry, **kwargs)
