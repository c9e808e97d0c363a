"""The orders of the paper's module as buffers: drawn, loaded or exchanged, and what the forms read of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sw_transplant.config import OrderRule
from sw_transplant.layers.branch import edge_indices
from sw_transplant.layers.orders import BRANCHES, active_channels, branch_tables, check_order, draw_orders
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.layers.tables import Tables


class OrderBuffers(ShiftwiseConv2d):
    """What the paper's module knows of its orders.

    Attributes:
        horizontal, vertical: int32 ``(E, active, T)``, the place of each tile.
        identity: int32 ``(E, active)``, the tile taken.
        active: int64 ``(active,)``, the channels that do not bypass the module, in ascending order.

    These four are for the state_dict. What runs are tables made of them, which nobody writes to.
    """

    STORES_ORDERS: ClassVar[bool] = True
    """Whether the orders and the active channels are part of the state_dict; else they follow from the seed."""

    tile: int
    edges: int
    seed: int
    order_rule: OrderRule
    gain: Any
    _ghost: float | Sequence[int]

    horizontal: Tensor
    vertical: Tensor
    identity: Tensor
    active: Tensor
    one_bank: Tensor
    _tables: Tables

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
        opposite = self.order_rule == "opposite"
        orders = draw_orders(len(active), self.tiles, self.edges, self.seed, opposite=opposite)
        return {**orders._asdict(), "active": active}

    def _follow(self, drawn: dict[str, Tensor]) -> None:
        """Derives from orders and active channels what the forms read."""
        sets = 1 if self.gain is None else self.edges
        tables = {name: drawn[name].detach().to("cpu", copy=True) for name in BRANCHES}
        for name in BRANCHES:
            placements, index = branch_tables(name, tables[name], self.tiles, self.tile, sets)
            tables |= {f"{name}_placements": placements, f"{name}_index": index}
        with torch.device("cpu"):
            row = torch.zeros(1, 1, 3, dtype=torch.int32)
            tables |= {"one_placements": row, "one_index": edge_indices(row, 1, 1, self.tile, (1, 1))}
            one = torch.zeros(len(drawn["active"]), 1, self.tile, self.tile, dtype=self._like.dtype)
            one[:, :, 0, 0] = 1
        self._derive("one_bank", one)
        self._hold({**tables, **self._channels(drawn["active"])})

    def _hold(self, tables: dict[str, Tensor]) -> None:
        self._tables = Tables(tables).only_on(self._like.device)
        self.clear_cache()

    def _channels(self, active: Tensor) -> dict[str, Tensor]:
        """The active channels and the others, on the CPU."""
        active = active.detach().to("cpu", copy=True)
        bypass = torch.ones(self.in_channels, dtype=torch.bool, device="cpu")
        bypass[active] = False
        return {"active": active, "ghosts": bypass.nonzero().flatten()}

    def _table(self, name: str) -> Tensor:
        """An order as it was drawn or loaded, or what follows from the orders, on the device of the filters."""
        return self._tables.on(self._like.device)[name]  # type: ignore[return-value]

    @property
    def ghosts(self) -> Tensor:
        """The channels that bypass the module, int64, ascending."""
        return self._table("ghosts")

    def _apply(self, *args: Any, **kwargs: Any) -> OrderBuffers:
        had_values = not self._like.is_meta
        super()._apply(*args, **kwargs)
        self._tables = self._tables.only_on(self._like.device)
        if not had_values and not self._like.is_meta:
            self._fill_constants()
        return self

    @torch.no_grad()
    def _fill_constants(self) -> None:
        """Gives buffers their values that have got memory but no values, by ``to_empty``."""
        known = {name: self._table(name) for name in (*BRANCHES, "active") if name in self._buffers}
        for name, values in known.items():
            getattr(self, name).copy_(values)
        if not self.merged:
            self._follow(known)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in (*BRANCHES, "active"):
            if f"{prefix}{name}" in destination:
                destination[f"{prefix}{name}"] = self._table(name).clone()

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
            if not self.active.is_meta:
                self._hold(self._channels(self.active))
            return
        if self.STORES_ORDERS:
            drawn = {name: getattr(self, name) for name in (*BRANCHES, "active")}
        else:  # the file does not hold them: they follow from the seed, whatever the memory held before
            drawn = self.draw()
            for name, values in drawn.items():
                self._derive(name, values)
        if not any(values.is_meta for values in drawn.values()):
            self._follow(drawn)

    def rederive(self) -> None:
        super().rederive()
        self.follow_orders()


def _follow_what_was_loaded(module: OrderBuffers, _: Any) -> None:
    module.follow_orders()
