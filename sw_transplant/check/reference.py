"""Both models once more in wide numbers: what they compute where nothing is rounded to 16 bits.

Numbers of 16 bits are too coarse to tell two functions apart by their outputs: a deep network in bfloat16 is several
percent from itself in float64, and so is everything that computes the same function in another order. Copies of the
same weights in float64 (a 16-bit number is one exactly) tell what is rounding and what is not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d

WIDE = (torch.float64, torch.float32)
Run = Callable[[nn.Module], Any]


class Reference:
    """Copies of both models in float64, or in float32 where float64 does not fit into memory or does not run.

    Args:
        original, converted: they stay as they are. The converted one gets a copy only where it holds the very weights
            of the original, laid out: weights that were rounded on the way are not the same function in wide numbers.

    Attributes:
        dtype: what the copies compute in; None once there is no reference.
        note: why there is none, or not in float64.
    """

    def __init__(self, original: nn.Module, converted: nn.Module) -> None:
        self._models = (original, converted if holds_the_same_weights(original, converted) else None)
        self._left = list(WIDE)
        self._copies: list[nn.Module | None] = []
        self.dtype: torch.dtype | None = None
        self.note = ""

    def outputs(self, run: Run) -> tuple[Any, Any] | None:
        """What the wide original and the wide converted model make of a batch.

        Args:
            run: runs a model on the batch.

        Returns:
            Both outputs, the second None where that model has no copy; None where neither dtype works.
        """
        while self.dtype is not None or self._left:
            try:
                if self.dtype is None:
                    self._widen(self._left[0])
                with _without_autocast():
                    outputs = [None if model is None else run(model) for model in self._copies]
                return outputs[0], outputs[1]
            except Exception as error:  # out of memory, a copy that fails, a dtype that the model's code does not take
                failed = self._left.pop(0)
                self.dtype, self._copies = None, []
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                self.note = f"not compared with {str(failed).removeprefix('torch.')}: {reason}"
        return None

    def _widen(self, dtype: torch.dtype) -> None:
        copies: list[nn.Module | None] = [
            None if model is None else copy.deepcopy(model).to(dtype=dtype) for model in self._models
        ]
        for model in copies:
            if model is not None:
                model.eval()
        self.dtype, self._copies = dtype, copies


def holds_the_same_weights(original: nn.Module, converted: nn.Module) -> bool:
    """Whether a model has the original's weights as they are, in its dtypes: all layers laid out, none folded."""
    layers = [module for module in converted.modules() if isinstance(module, ShiftwiseConv2d)]
    dtypes = [{p.dtype for p in model.parameters() if p.is_floating_point()} for model in (original, converted)]
    return bool(layers) and all(layer.match is not None for layer in layers) and dtypes[0] == dtypes[1]


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Autocast would round to 16 bits what is to be wide."""
    with ExitStack() as switches:
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                switches.enter_context(torch.autocast(kind, enabled=False))
        yield
