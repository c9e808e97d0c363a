"""The moments of one layer over all runs: maps of any sizes, checked as they come."""

from __future__ import annotations

import torch
from torch import Tensor

from sw_transplant.geometry import Size
from sw_transplant.surgery.calibration.moments import Accumulator, Moments, Taps


class Sums:
    """Adds up what a layer gets and should give.

    Args:
        path: of the layer, for messages.
        length, tile, stride: of the module that is fitted.
    """

    def __init__(self, path: str, length: int, tile: int, stride: Size) -> None:
        self.path, self.length, self.tile, self.stride = path, length, tile, stride
        self.images = 0
        self._by_size: dict[tuple[Size, Size], Accumulator] = {}

    def add(self, x: Tensor, y: Tensor) -> None:
        """One call of the layer: input ``(B, C, H, W)`` and target ``(B, C, H', W')``.

        Raises:
            ValueError: NaN or infinity among them.
        """
        for what, tensor in (("input", x), ("output", y)):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{self.path or 'model'}: the calibration images give NaN or infinity in the layer's {what}; "
                    "expected finite numbers: leave such images out, or run the model in a wider dtype"
                )
        sizes = ((x.shape[2], x.shape[3]), (y.shape[2], y.shape[3]))
        if sizes not in self._by_size:
            self._by_size[sizes] = Accumulator(Taps(self.length, self.tile, *sizes, self.stride))
        self._by_size[sizes].add(x, y)
        self.images += len(x)

    @property
    def positions(self) -> int:
        """Outputs of a channel so far."""
        return sum(each.positions for each in self._by_size.values())

    @property
    def reaching(self) -> int:
        """The most taps of the strips that reach a map."""
        return max((len(each.taps.offsets) - self.tile**2 for each in self._by_size.values()), default=0)

    def moments(self) -> Moments:
        """Over all taps of the strips."""
        first, *others = [each.moments().spread(each.taps) for each in self._by_size.values()]
        for other in others:
            first = first + other
        return first
