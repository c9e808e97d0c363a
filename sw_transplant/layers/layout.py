"""How the kernel of a laid-out branch lies in its bank, one number for one: there and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sw_transplant.equivalence import lay_out, undo_lay_out
from sw_transplant.geometry import Size


@dataclass(frozen=True)
class Layout:
    """Between a kernel ``(C_out, 1, kh, kw)`` and its bank ``(C_out, T, n, n)``. Both ways are differentiable.

    Attributes:
        kernel_size: ``(kh, kw)``.
        tile: n.
        channels_last: whether the bank is laid out so.
    """

    kernel_size: Size
    tile: int
    channels_last: bool = False

    def to_dense(self, bank: Tensor) -> Tensor:
        """The kernel. What the tiles hold beyond it is left out."""
        return undo_lay_out(bank, self.kernel_size)

    def to_bank(self, kernel: Tensor) -> Tensor:
        """The bank; zeros where tiles reach beyond the kernel."""
        bank, _ = lay_out(kernel, self.tile)
        return bank.contiguous(memory_format=torch.channels_last) if self.channels_last else bank
