"""Which tiles of a bank are in use: a mask that travels with the state_dict, and what it does to the bank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sw_transplant.forms import LiveTiles


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

    def live_tiles(self) -> LiveTiles | None:
        """What the forms may leave out; None for nothing, as while the tiles that are not in use explore."""
        if self.mask is None or self.explores:
            return None
        return self.__dict__.setdefault("_live_memo", LiveMemo())([self.mask])  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.mask is None and f"{prefix}mask" in state_dict:  # saved after the masks were made
            self.mask = torch.ones(self.tile_count, dtype=torch.bool, device=self._mask_device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]


class LiveMemo:
    """Keeps what :class:`LiveTiles` a set of masks gives until one of them is written to or exchanged.

    How many tiles the fullest channel uses decides on shapes, so that finding it has to wait for the device.
    """

    def __init__(self) -> None:
        self._known: tuple[list[tuple[Tensor, int]], LiveTiles | None] | None = None

    def __call__(self, masks: Sequence[Tensor]) -> LiveTiles | None:
        """The order that brings tiles to the front that any of the masks ``(C, T)`` has in use.

        None where that is all of them, and while ``torch.compile`` traces, which makes no shapes from values.
        """
        if torch.compiler.is_compiling() or any(mask.is_meta for mask in masks):
            return None
        if any(mask.is_inference() for mask in masks):  # these do not count their changes
            return _live_tiles(masks)
        if self._known is None or not _unchanged(self._known[0], masks):
            with torch.inference_mode(False):  # what is kept may be saved for a backward pass later
                self._known = ([(mask, mask._version) for mask in masks], _live_tiles(masks))
        return self._known[1]

    def __reduce__(self) -> Any:
        return LiveMemo, ()  # copies and pickles start anew


def _unchanged(known: list[tuple[Tensor, int]], masks: Sequence[Tensor]) -> bool:
    return len(known) == len(masks) and all(
        old is mask and version == mask._version for (old, version), mask in zip(known, masks, strict=True)
    )


def _live_tiles(masks: Sequence[Tensor]) -> LiveTiles | None:
    used = torch.stack(list(masks)).any(0)
    if bool(used.all()):
        return None
    most = max(int(used.sum(1).max()), 1)  # a convolution needs a filter
    order = (~used).to(torch.uint8).argsort(dim=1, stable=True)
    place = torch.arange(used.shape[1], device=used.device).expand_as(order)
    position = torch.empty_like(order).scatter_(1, order, place)
    return LiveTiles(order[:, :most].contiguous(), torch.where(used, position, -1).to(torch.int32))
