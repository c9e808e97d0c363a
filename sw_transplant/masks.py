"""Which tiles of a bank are in use: a mask that travels with the state_dict, and what it does to the bank."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor


class MaskedTiles:
    """Mixin of the modules that hold a bank of tiles: a tile that is not in use adds nothing and gets no gradient.

    Attributes:
        mask: bool buffer ``(C, T)``, or None for all. Write to it in place, or use :meth:`set_mask`.
        explores: let tiles that are not in use have a gradient all the same. They still contribute nothing. For
            growing by gradient (:class:`sw_transplant.sparsity.FilterSparsity`); not part of the state_dict.
    """

    mask: Tensor | None
    explores: bool = False

    @property
    def tile_count(self) -> tuple[int, int]:
        """``(C, T)``."""
        raise NotImplementedError

    def set_mask(self, mask: Tensor | None) -> None:
        """Takes the tiles of a bool mask ``(C, T)`` into use, or with None all. The weights stay as they are.

        Raises:
            ValueError: another shape or dtype.
        """
        if mask is None:
            self.mask = None
            return
        if tuple(mask.shape) != self.tile_count or mask.dtype != torch.bool:
            raise ValueError(
                f"{type(self).__name__}.set_mask: {mask.dtype} of shape {tuple(mask.shape)}, "
                f"expected torch.bool {self.tile_count}"
            )
        self.mask = mask.detach().to(self._mask_device, copy=True)

    def masked(self, bank: Tensor) -> Tensor:
        """A bank ``(C, T, n, n)`` with zeros for the tiles that are not in use."""
        if self.mask is None:
            return bank
        # Zero as a value; the difference has the gradient of the bank.
        idle = bank - bank.detach() if self.explores else 0
        return torch.where(self.mask[:, :, None, None], bank, idle)

    @property
    def _mask_device(self) -> torch.device:
        tensors = chain(self.parameters(), self.buffers())  # type: ignore[attr-defined]
        return next(tensors).device  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.mask is None and f"{prefix}mask" in state_dict:  # saved after the masks were made
            self.mask = torch.ones(self.tile_count, dtype=torch.bool, device=self._mask_device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]
