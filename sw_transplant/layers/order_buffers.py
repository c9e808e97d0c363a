"""The orders of the paper's module as buffers: drawn, loaded or exchanged, and what the forms read of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sw_transplant.layers.branch import edge_indices
from sw_transplant.layers.orders import BRANCHES, active_channels, branch_tables, check_order, draw_orders
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d


class OrderBuffers(ShiftwiseConv2d):
    """What the paper's module knows of its orders.

    Attributes:
        horizontal, vertical: int32 ``(E, active, T)``, the place of each tile.
        identity: int32 ``(E, active)``, the tile taken.
        active: int64 ``(active,)``, the channels that do not bypass the module, in ascending order.
        ghosts: int64, those that do. What follows from the four above is derived, and not part of the state_dict.
    """

    STORES_ORDERS: ClassVar[bool] = True
    """Whether the orders and the active channels are part of the state_dict; else they follow from the seed."""

    tile: int
    edges: int
    seed: int
    gain: Any
    _ghost: float | Sequence[int]

    horizontal: Tensor
    vertical: Tensor
    identity: Tensor
    active: Tensor
    ghosts: Tensor
    one_bank: Tensor
    one_placements: Tensor
    one_index: Tensor

    @property
    def tiles(self) -> int:
        """T, the number of tiles per channel and path."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether the module has been turned into plain kernels, for which orders mean nothing."""
        raise NotImplementedError

    def _hold_orders(self, drawn: dict[str, Tensor]) -> None:
        """Makes the buffers. The banks are there already: they name the device."""
        for name, values in drawn.items():
            self.register_buffer(name, values.to(self._like.device), persistent=self.STORES_ORDERS)
        self._follow(drawn)
        self.register_load_state_dict_post_hook(_follow_what_was_loaded)

    def set_orders(self, horizontal: Tensor, vertical: Tensor, identity: Tensor) -> None:
        """Exchanges the orders: ``(E, active, T)`` places of the tiles, twice, and ``(E, active)`` tiles taken.

        Raises:
            ValueError: another shape, or a place or tile that does not exist.
        """
        orders = dict(zip(BRANCHES, (horizontal, vertical, identity), strict=True))
        for name, order in orders.items():
            check_order(f"SWConv2d.{name}", order, getattr(self, name).shape, self.tiles)
        for name, order in orders.items():
            getattr(self, name).copy_(order)
        self._follow({**orders, "active": self.active})

    def draw(self) -> dict[str, Tensor]:
        """Orders and active channels, as they follow from the seed; on the CPU."""
        active = active_channels(self.in_channels, self._ghost, self.seed)
        return {**draw_orders(len(active), self.tiles, self.edges, self.seed)._asdict(), "active": active}

    def _follow(self, drawn: dict[str, Tensor]) -> None:
        """Derives from orders and active channels what the forms read."""
        sets = 1 if self.gain is None else self.edges
        for name in BRANCHES:
            placements, index = branch_tables(name, drawn[name], self.tiles, self.tile, sets)
            self._derive(f"{name}_placements", placements)
            self._derive(f"{name}_index", index)
        with torch.device("cpu"):
            bypass = torch.ones(self.in_channels, dtype=torch.bool)
            bypass[drawn["active"].cpu()] = False
            self._derive("ghosts", bypass.nonzero().flatten())
            one = torch.zeros(len(drawn["active"]), 1, self.tile, self.tile, dtype=self._like.dtype)
            one[:, :, 0, 0] = 1
            row = torch.zeros(1, 1, 3, dtype=torch.int32)
            self._derive("one_bank", one)
            self._derive("one_placements", row)
            self._derive("one_index", edge_indices(row, 1, 1, self.tile, (1, 1)))
        self.clear_cache()

    def _derive(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor.to(self._like.device), persistent=False)

    def reset_orders(self) -> None:
        """Draws them from the seed again."""
        drawn = self.draw()
        for name, values in drawn.items():
            getattr(self, name).copy_(values)
        self._follow(drawn)

    def follow_orders(self) -> None:
        """Derives what follows from the orders, after something else than ``load_state_dict`` filled the buffers."""
        if self.merged:
            return
        if self.STORES_ORDERS:
            drawn = {name: getattr(self, name) for name in (*BRANCHES, "active")}
        else:  # the file does not hold them: they follow from the seed, whatever the memory held before
            drawn = self.draw()
            for name, values in drawn.items():
                self._derive(name, values)
        if not any(values.is_meta for values in drawn.values()):
            self._follow(drawn)


def _follow_what_was_loaded(module: OrderBuffers, _: Any) -> None:
    module.follow_orders()
