"""SLaK: a ConvNeXt whose 7 × 7 kernels became strips of 51 × 5 and 5 × 51 (Liu et al., ICLR 2023)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from torch import nn

from sw_transplant.models.large_kernel import ReparamLargeKernelConv
from sw_transplant.models.registry import build, preprocessing
from sw_transplant.models.staged import StagedNet, drop_path_rates, require_stages

__all__ = ["SLaK"]


Arrangement = Literal["strips", "square", "sequential", "stacked", "dilated"]
STACKED, DILATION = 10, 3


def _branches(long: int, short: int, arrangement: Arrangement) -> dict[str, Any]:
    """The branches of one layer; a short side that is not shorter than the long one leaves the square alone.

    Dilated kernels are longer than their sides, and keep the small one beside them.
    """
    if short >= long and arrangement != "dilated":
        return {"lkb_origin": (long, long)}
    first, second = (long, short), (short, long)
    large: dict[Arrangement, dict[str, Any]] = {
        "strips": {"LoRA1": first, "LoRA2": second},
        "square": {"lkb_origin": (long, long)},
        "sequential": {"sequential": (first, second)},
        "stacked": {"stacked": ((3, 3),) * STACKED},
        "dilated": {"lkb_origin": (long, long)},
    }
    return {**large[arrangement], "small_conv": (short, short)}


class Block(nn.Module):
    """Strips, LayerNorm, a two-layer perceptron per position, layer scale, residual."""

    def __init__(self, dim: int, large_kernel: nn.Module, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.large_kernel = large_kernel
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim)) if layer_scale > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.large_kernel(x).permute(0, 2, 3, 1)  # (B, H, W, C)
        y = self.pwconv2(self.act(self.pwconv1(self.norm(y))))
        if self.gamma is not None:
            y = self.gamma * y
        return x + self.drop_path(y.permute(0, 3, 1, 2))


def patch_entrances(in_chans: int, dims: Sequence[int]) -> nn.ModuleList:
    """The stem, a convolution of stride 4, and the downsampling layers, of stride 2, each with a LayerNorm."""
    stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4), LayerNorm2d(dims[0], eps=1e-6))
    layers = nn.ModuleList([stem])
    for narrow, wide in pairwise(dims):
        halving = nn.Conv2d(narrow, wide, kernel_size=2, stride=2)
        layers.append(nn.Sequential(LayerNorm2d(narrow, eps=1e-6), halving))
    return layers


class SLaK(StagedNet):
    """SLaK, with the parameter names and shapes of its published checkpoints (SLaK, Section 4.1).

    Args:
        in_chans: channels of the input image.
        num_classes: outputs of the classifier; 0 for none.
        depths: blocks of the four stages.
        dims: channels of the four stages, before `width_factor`.
        kernel_size: the long side of the kernel in each of the four stages, then the short side of all strips, which is
            also that of the small kernel beside them. A stage whose long side is not longer than that has a square
            kernel alone, unless it is dilated: (51, 49, 47, 13, 100) enlarges ConvNeXt's kernels naively (SLaK, Table
            1).
        width_factor: multiplies `dims`, rounding down; 1.3 in the published sizes.
        drop_path_rate: stochastic depth of the last block; the others rise to it linearly.
        layer_scale_init_value: initial layer scale; none if not positive.
        head_init_scale: factor on the classifier's initial weights.
        Decom: strips (the published models) if true, square kernels otherwise.
        arrangement: another choice of SLaK's Table 13 instead: ``"sequential"``, one strip after the other;
            ``"stacked"``, ten 3 x 3 kernels one after the other; ``"dilated"``, square kernels of dilation 3, in the
            paper of 19, 17, 17 and 5; or ``"strips"`` and ``"square"``. None: what `Decom` says.
        global_pool: 'avg', 'max', 'avgmax', or '' without classifier.
        drop_rate: dropout in front of the classifier.
        stage_norms: a LayerNorm for the features of each stage, ``norm0`` to ``norm3``, as in the published backbones
            of detectors and segmenters; they act on features alone.

    Raises:
        ValueError: if a setting has the wrong number of entries or a kernel an even side.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        kernel_size: Sequence[int] = (51, 49, 47, 13, 5),
        width_factor: float = 1.0,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
        Decom: bool = True,
        arrangement: Arrangement | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        stage_norms: bool = False,
    ) -> None:
        require_stages("SLaK", fifth="the short side of the strips", depths=depths, dims=dims, kernel_size=kernel_size)
        if arrangement not in (None, *get_args(Arrangement)):
            raise ValueError(f"SLaK: arrangement {arrangement!r}, expected None or one of {get_args(Arrangement)}")
        arrangement = arrangement or ("strips" if Decom else "square")
        dims = [int(dim * width_factor) for dim in dims]
        super().__init__(dims, in_chans, drop_rate)

        self.downsample_layers = patch_entrances(in_chans, dims)
        *long_sides, short = kernel_size
        self.stages = nn.ModuleList()
        for dim, long, rates in zip(dims, long_sides, drop_path_rates(drop_path_rate, depths), strict=True):
            branches = _branches(long, short, arrangement)
            blocks = []
            for rate in rates:
                large_kernel = ReparamLargeKernelConv(dim, branches, DILATION if arrangement == "dilated" else 1)
                blocks.append(Block(dim, large_kernel, rate, layer_scale_init_value))
            self.stages.append(nn.Sequential(*blocks))

        self._finish(dims, num_classes, global_pool, head_init_scale, stage_norms)


default_cfgs = generate_default_cfgs(
    {f"slak_{size}": preprocessing("downsample_layers.0.0") for size in ("tiny", "small", "base", "large")}
)


def geometry(width: int, third: int) -> dict[str, Any]:
    """A published size: ConvNeXt's `width` of the first stage, doubled from stage to stage, and the third's depth."""
    return {"depths": (3, 3, third, 3), "dims": tuple(width * 2**stage for stage in range(4)), "width_factor": 1.3}


@register_model
def slak_tiny(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK-T, 50.7 M parameters."""
    return build(SLaK, "slak_tiny", pretrained, geometry(96, 9), **kwargs)


@register_model
def slak_small(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK-S, 91.1 M parameters."""
    return build(SLaK, "slak_small", pretrained, geometry(96, 27), **kwargs)


@register_model
def slak_base(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK-B, 158.0 M parameters."""
    return build(SLaK, "slak_base", pretrained, geometry(128, 27), **kwargs)


@register_model
def slak_large(pretrained: bool = False, **kwargs: Any) -> SLaK:
    """SLaK-L, 346.6 M parameters."""
    return build(SLaK, "slak_large", pretrained, geometry(192, 27), **kwargs)
