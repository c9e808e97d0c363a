"""The shortest way through a layer on a CPU, where Python between two small convolutions costs as much as they do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sw_transplant.forms.assembled import Convolutions
from sw_transplant.forms.placed import Call
from sw_transplant.layers.watch import Watch
from sw_transplant.ops.depthwise import layout_of, runs_as_it_is


class Shortcut:
    """What a layer does with a map that is just like the one before, while the layer stays as it is.

    A map of the same shape, strides and dtype takes the same way, so that little is left to be asked. The results are
    those of the long way, bit for bit.

    Args:
        like: the map.
        given: the same in the memory format that the layer wants.
        entry, bias: the one output of a plan of form "assembled", on a CPU.
        watch: of the layer.
    """

    def __init__(self, like: Tensor, given: Tensor, entry: Convolutions, bias: Tensor | None, watch: Watch) -> None:
        self._shape, self._strides, self._dtype = like.shape, like.stride(), like.dtype
        self._first, *self._others = [
            layer.step(given, bias if i == 0 else None) for i, layer in enumerate(entry.layers)
        ]
        self._turns = given is not like
        self._layout = layout_of(given)
        self._inference = torch.is_inference_mode_enabled()
        self._watch = watch

    @staticmethod
    def applies(plan: Sequence[object], call: Call, like: Tensor) -> bool:
        """Whether a plan is for this map, and of the kind that there is a shortcut for."""
        if like.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        entry = plan[0] if len(plan) == 1 else None
        fits = like.dtype is call.dtype and like.shape[2:] == call.in_size
        return fits and isinstance(entry, Convolutions) and bool(entry.layers) and not entry.residual

    def __call__(self, x: Tensor) -> Tensor | None:
        """The layer's output, or None where the long way is to be taken."""
        if (
            type(x) is not Tensor
            or x.shape != self._shape
            or x.stride() != self._strides
            or x.dtype is not self._dtype
            or not runs_as_it_is(x)
            or torch.is_autocast_enabled("cpu")
            or torch.is_inference_mode_enabled() is not self._inference
            or not self._watch.unchanged()
        ):
            return None
        if self._turns:
            x = x.contiguous(memory_format=torch.channels_last)
        y = self._first(x)
        for step in self._others:
            y += step(x)
        return y.contiguous(memory_format=self._layout)
