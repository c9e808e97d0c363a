"""SW in SLaK's frame: the networks of the ShiftwiseConv paper's first steps, before it took UniRepLKNet's frame."""

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from sw_transplant.config import OrderRule
from sw_transplant.layers.orders import ghost_channels
from sw_transplant.models.cut_borders import CutSWConv2d
from sw_transplant.models.registry import build, preprocessing
from sw_transplant.models.shiftwise import PublishedSWConv2d
from sw_transplant.models.slak import Block, geometry, patch_entrances
from sw_transplant.models.staged import StagedNet, drop_path_rates, require_stages

__all__ = ["ShiftWiseSLaK"]


class ShiftWiseSLaK(StagedNet):
    """SLaK with the paper's module instead of its strips (#3 to #15 of the paper's ladder).

    Parameters have the names and shapes of the authors' first network. Of the C channels of a block
    ``int(C * ghost_ratio)`` bypass the module; which ones, and the orders, follow from a seed.

    Args:
        in_chans: channels of the input image.
        num_classes: outputs of the classifier; 0 for none.
        depths: blocks of the four stages.
        dims: channels of the four stages, before `width_factor`.
        kernel_size: length of the strips in each of the four stages, then the side of the filters that make them.
        width_factor: multiplies `dims`, rounding down; 1.3 in the registered sizes.
        drop_path_rate: stochastic depth of the last block; the others rise to it linearly.
        layer_scale_init_value: initial layer scale; none if not positive.
        head_init_scale: factor on the classifier's initial weights.
        ghost_ratio: fraction of channels that bypass the large kernel.
        N_path: parallel banks that are summed before the shift.
        N_rep: edges, the orders in which each strip places the bank.
        orders: ``"random"``, or ``"opposite"`` with one edge, see :class:`sw_transplant.layers.sw_conv2d.SWConv2d`.
        cut_borders: pad the filters by N // 2 instead of N - 1, as in #3 alone: responses beside the map are missing
            from the sums (:class:`sw_transplant.models.cut_borders.CutSWConv2d`); without ghosts.
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
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        kernel_size: Sequence[int] = (51, 49, 47, 13, 3),
        width_factor: float = 1.0,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
        ghost_ratio: float = 0.23,
        N_path: int = 2,
        N_rep: int = 4,
        orders: OrderRule = "random",
        cut_borders: bool = False,
        form: str = "auto",
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        stage_norms: bool = False,
    ) -> None:
        require_stages(
            "ShiftWiseSLaK", fifth="the side of the filters", depths=depths, dims=dims, kernel_size=kernel_size
        )
        dims = [int(dim * width_factor) for dim in dims]
        super().__init__(dims, in_chans, drop_rate)

        self.downsample_layers = patch_entrances(in_chans, dims)
        *lengths, tile = kernel_size
        self.stages = nn.ModuleList()
        for dim, length, rates in zip(dims, lengths, drop_path_rates(drop_path_rate, depths), strict=True):
            ghosts = ghost_channels(dim, ghost_ratio, even=False)
            blocks = []
            for rate in rates:
                large_kernel = (CutSWConv2d if cut_borders else PublishedSWConv2d)(
                    dim,
                    length,
                    tile,
                    edges=N_rep,
                    paths=N_path,
                    ghost=ghosts,
                    ghosts_last=True,
                    orders=orders,
                    form=form,
                )
                blocks.append(Block(dim, large_kernel, rate, layer_scale_init_value))
            self.stages.append(nn.Sequential(*blocks))

        self._finish(dims, num_classes, global_pool, head_init_scale, stage_norms)


default_cfgs = generate_default_cfgs(
    {f"sw_slak_{size}": preprocessing("downsample_layers.0.0") for size in ("tiny", "small", "base")}
)


@register_model
def sw_slak_tiny(pretrained: bool = False, **kwargs: Any) -> ShiftWiseSLaK:
    """SLaK-T's frame with the paper's module, four edges and two paths (#11 of the paper's ladder)."""
    return build(ShiftWiseSLaK, "sw_slak_tiny", pretrained, geometry(96, 9), **kwargs)


@register_model
def sw_slak_small(pretrained: bool = False, **kwargs: Any) -> ShiftWiseSLaK:
    """SLaK-S's frame with the paper's module; the paper reports no training."""
    return build(ShiftWiseSLaK, "sw_slak_small", pretrained, geometry(96, 27), **kwargs)


@register_model
def sw_slak_base(pretrained: bool = False, **kwargs: Any) -> ShiftWiseSLaK:
    """SLaK-B's frame with the paper's module; the paper reports no training."""
    return build(ShiftWiseSLaK, "sw_slak_base", pretrained, geometry(128, 27), **kwargs)
