"""The paper's module with filters padded by N // 2, as its third step has it (#3)."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from sw_transplant.forms import Call, DenseKernel, prepare_shift
from sw_transplant.forms.dispatch import Decision, conditions
from sw_transplant.models.shiftwise import PublishedSWConv2d
from sw_transplant.ops import shift_add
from sw_transplant.ops.depthwise import depthwise_conv2d, layout_of

__all__ = ["CutSWConv2d"]


class CutSWConv2d(PublishedSWConv2d):
    """The module as it was before its filters were padded by N - 1: at the borders, what is missing counts as zero.

    With a padding of N // 2 there are responses only where a filter is centred on the map. Filters that overlap the map
    from outside, and would be shifted onto it, add nothing: no large kernel does that, so that the module runs as small
    convolutions and shifts alone, whatever its `form` is called, and neither merges nor has a dense kernel.

    Args:
        channels, kernel_size, tile: as of :class:`sw_transplant.layers.sw_conv2d.SWConv2d`; `tile` odd.
        settings: its further arguments; no ghosts, no gains and stride 1, as in the paper's third step.

    Raises:
        ValueError: other settings.
    """

    def __init__(self, channels: int, kernel_size: int, tile: int, **settings: Any) -> None:
        super().__init__(channels, kernel_size, tile, **{**settings, "form": "shift"})
        if tile % 2 == 0 or len(self.ghosts) or self.gain is not None or self.stride != (1, 1):
            raise ValueError(
                f"CutSWConv2d: tile={tile}, {len(self.ghosts)} ghosts, stride={self.stride}"
                f"{'' if self.gain is None else ', gains'}; expected an odd tile, no ghosts, stride 1 and no gains"
            )

    @property
    def decision(self) -> Decision:
        """Form "shift", always."""
        return Decision("shift", "its borders are cut")

    def _run(self, x: Tensor) -> Tensor:
        if self.merged:
            self._refuse("running what was merged")
        size, middle = (x.shape[2], x.shape[3]), self.tile // 2
        branches = [branch for branch in self.parts() if not branch.is_identity]
        outputs = [branch.placed(self.extent_on(branch, size).origin, fold=False) for branch in branches]
        dtype = conditions(x).autocast or self._like.dtype
        (group,) = prepare_shift(outputs, Call(size, size, (1, 1), dtype))
        z = depthwise_conv2d(x.to(dtype), group.weight, None, (1, 1), (middle, middle), (1, 1))
        z = z.unflatten(1, (-1, group.tiles))  # (B, C, T, H, W)
        rows = group.table - group.table.new_tensor([0, middle, middle])  # they count from a padding of N - 1
        y = x if self.residual else torch.zeros_like(x)
        for branch, responses in zip(branches, shift_add(z, rows, size), strict=True):
            y = y + (responses if branch.bn is None else branch.bn(responses))
        return y.contiguous(memory_format=layout_of(x))

    def _dense(self) -> list[DenseKernel]:
        self._refuse("a dense kernel")

    def _refuse(self, what: str) -> NoReturn:
        raise NotImplementedError(
            f"CutSWConv2d: {what} is not possible: filters padded by N // 2 make no large kernel; "
            "cut_borders=False pads them by N - 1"
        )
