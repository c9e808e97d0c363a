"""SW: UniRepLKNet's frame around small filters that are shifted along rows and columns (ShiftwiseConv, CVPR 2025)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.models.large_kernel import depthwise
from sw_transplant.models.registry import build, preprocessing
from sw_transplant.models.staged import StagedNet, drop_path_rates, require_stages
from sw_transplant.models.unireplknet import UniRepLKNetBlock, overlapping_entrances

__all__ = ["ShiftWise"]


class PublishedSWConv2d(SWConv2d):
    """The paper's module as its checkpoints have it: their names, ghosts last, orders that follow from the seed."""

    NAMES: ClassVar[dict[str, str]] = {
        "paths": "LoRAs",
        "horizontal": "bn_lora1",
        "vertical": "bn_lora2",
        "identity": "bn_small",
    }
    STORES_ORDERS: ClassVar[bool] = False


class ShiftWiseBlock(UniRepLKNetBlock):
    """UniRepLKNet's block with the paper's module in it; without squeeze and excitation its norm is a LayerNorm."""

    SPATIAL: ClassVar[str] = "large_kernel"

    def __init__(self, dim: int, spatial: nn.Module, drop_path: float, layer_scale: float, se: bool = True) -> None:
        super().__init__(dim, spatial, drop_path, layer_scale)
        if not se:
            del self.se
            self.norm = nn.LayerNorm(dim, eps=1e-6)  # type: ignore[assignment]
            self.pwconv1 = nn.Linear(dim, 4 * dim)  # type: ignore[assignment]

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.norm, nn.LayerNorm):
            y = getattr(self, self.SPATIAL)(x)
            return self.norm(y.permute(0, 2, 3, 1))  # (B, H, W, C)
        return super().mixed(x)


class ShiftWise(StagedNet):
    """SW, with the parameter names and shapes of its published checkpoints (the paper, Table 8 of the appendix).

    The checkpoints do not hold the random orders and the ghost channels: they are drawn again, always alike
    (:mod:`sw_transplant.layers.orders`). Build the model with the `ghost_ratio` and the `N_rep` that a file was trained
    with.

    Args:
        in_chans: channels of the input image.
        num_classes: outputs of the classifier; 0 for none.
        depths: blocks of the four stages.
        dims: channels of the four stages, before `width_factor`; the first must be even, and all at least 4.
        kernel_size: length of the strips in each of the four stages, then the side of the filters that make them.
        width_factor: multiplies `dims`, rounding down.
        drop_path_rate: stochastic depth of the last block; the others rise to it linearly.
        layer_scale_init_value: initial layer scale; none if not positive.
        head_init_scale: factor on the classifier's initial weights.
        ghost_ratio: fraction of channels that bypass the large kernel.
        N_path: parallel banks that are summed before the shift.
        N_rep: edges, the orders in which each strip places the bank.
        se: squeeze and excitation (the paper's #20 and the published networks). False: #19 and #25.
        interleaved: large kernels where UniRepLKNet has them only: not in the first stage, nor in every second block of
            the third, which get a depthwise convolution of the filters' size (#23).
        form: how the large kernels run, see :class:`sw_transplant.ShiftwiseConv2d`.
        global_pool: 'avg', 'max', 'avgmax', or '' without classifier.
        drop_rate: dropout in front of the classifier.
        stage_norms: a LayerNorm for the features of each stage, ``norm0`` to ``norm3``, as in the published backbones
            of detectors and segmenters; they act on features alone.

    Raises:
        ValueError: if a setting has the wrong number of entries or is out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 3, 18, 3),
        dims: Sequence[int] = (80, 160, 320, 640),
        kernel_size: Sequence[int] = (51, 49, 47, 13, 3),
        width_factor: float = 1.0,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
        ghost_ratio: float = 0.23,
        N_path: int = 2,
        N_rep: int = 4,
        se: bool = True,
        interleaved: bool = False,
        form: str = "auto",
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        stage_norms: bool = False,
    ) -> None:
        require_stages("ShiftWise", fifth="the side of the filters", depths=depths, dims=dims, kernel_size=kernel_size)
        dims = [int(dim * width_factor) for dim in dims]
        super().__init__(dims, in_chans, drop_rate)

        self.downsample_layers = overlapping_entrances(in_chans, dims)
        *lengths, tile = kernel_size
        self.stages = nn.ModuleList()
        for stage, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            dim, length = dims[stage], lengths[stage]
            blocks = []
            for i, rate in enumerate(rates):
                small = interleaved and (stage == 0 or (stage == 2 and i % 2 == 1))
                spatial = (
                    depthwise(dim, (tile, tile))
                    if small
                    else PublishedSWConv2d(
                        dim, length, tile, edges=N_rep, paths=N_path, ghost=ghost_ratio, ghosts_last=True, form=form
                    )
                )
                blocks.append(ShiftWiseBlock(dim, spatial, rate, layer_scale_init_value, se))
            self.stages.append(nn.Sequential(*blocks))

        self._finish(dims, num_classes, global_pool, head_init_scale, stage_norms)


default_cfgs = generate_default_cfgs(
    {f"sw_{size}": preprocessing("downsample_layers.0.0") for size in ("tiny", "small", "base", "large")}
)


def _geometry(width: int, third: int) -> dict[str, Any]:
    """UniRepLKNet's sizes: `width` of the first stage, doubled from stage to stage, and the third's depth."""
    return {"depths": (3, 3, third, 3), "dims": tuple(width * 2**stage for stage in range(4))}


@register_model
def sw_tiny(pretrained: bool = False, **kwargs: Any) -> ShiftWise:
    """SW-T, 31.8 M parameters."""
    return build(ShiftWise, "sw_tiny", pretrained, _geometry(80, 18), **kwargs)


@register_model
def sw_small(pretrained: bool = False, **kwargs: Any) -> ShiftWise:
    """SW-S, 57.3 M parameters."""
    return build(ShiftWise, "sw_small", pretrained, _geometry(96, 27), **kwargs)


@register_model
def sw_base(pretrained: bool = False, **kwargs: Any) -> ShiftWise:
    """SW-B, 100.3 M parameters; the authors define it, but report no training (the paper, Appendix E)."""
    return build(ShiftWise, "sw_base", pretrained, _geometry(128, 27), **kwargs)


@register_model
def sw_large(pretrained: bool = False, **kwargs: Any) -> ShiftWise:
    """SW-L, 221.8 M parameters; the authors define it, but report no training (the paper, Appendix E)."""
    return build(ShiftWise, "sw_large", pretrained, _geometry(192, 27), **kwargs)
