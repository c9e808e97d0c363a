"""Placements and what follows from them: integers that a module reads and nobody trains.

They are no buffers. What averages buffers, as :class:`torch.optim.swa_utils.AveragedModel` does when asked to, would
average places, and at a decay of 0.9999 truncate 11 to 10; and DDP would send them round before every step. What the
state_dict holds of them is a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Tables:
    """Tensors by name, on every device where they are asked for; they are not to be written to.

    Kept on the CPU as well, so that a module that was on the meta device has them all the same.

    Args:
        tensors: copied to the CPU; None for one that says nothing.
    """

    def __init__(self, tensors: Mapping[str, Tensor | None]) -> None:
        self._host = {name: None if tensor is None else tensor.detach().cpu() for name, tensor in tensors.items()}
        self._placed: dict[torch.device, dict[str, Tensor | None]] = {torch.device("cpu"): self._host}

    def on(self, device: torch.device) -> dict[str, Tensor | None]:
        """The tensors on a device, the same at every call."""
        found = self._placed.get(device)
        if found is None:
            found = {name: None if tensor is None else tensor.to(device) for name, tensor in self._host.items()}
            self._placed[device] = found
        return found

    def only_on(self, device: torch.device) -> Tables:
        """Tables that take memory on the CPU and on this device."""
        tables = Tables(self._host)
        tables.on(device)
        return tables

    def __deepcopy__(self, memo: dict[int, Any]) -> Tables:
        return self  # nobody writes to them

    def __reduce__(self) -> Any:
        return Tables, (self._host,)
