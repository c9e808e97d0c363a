"""The taps that banks make for given orders, and the normal equations of banks, without a matrix of that map.

A number of the bank stands at the same place of its tile wherever an order puts the tile. So the map from the K = T n n
numbers of a bank to the P taps of both strips is, in each branch, one T x T matrix that counts which tile lies in which
place, and the same for all n n numbers of a tile: normal equations take some P**2 T products instead of P**2 K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sw_transplant.layers.orders import Orders
from sw_transplant.surgery.calibration.moments import Taps


def select_orders(orders: Orders, channels: Tensor | slice) -> Orders:
    """Those of some channels."""
    return Orders(*(order[:, channels] for order in orders))


class Assembly:
    """The taps of each branch as a map of the bank; float64, on the device of the orders.

    Args:
        orders: of C channels.
        taps: of the strips.
        scales: ``(C, 3)``, what multiplies each branch; ones where None.
    """

    def __init__(self, orders: Orders, taps: Taps, scales: Tensor | None = None) -> None:
        horizontal, vertical, identity = (order.long() for order in orders)
        self._n, self._tiles = taps.tile, horizontal.shape[2]
        self._twins = taps.twins.to(horizontal.device)[:, 0]
        place = torch.eye(self._tiles, dtype=torch.float64, device=horizontal.device)
        self._along, self._down = place[horizontal].sum(0), place[vertical].sum(0)  # (C, tile, place): how many edges
        self._taken = place[identity].sum(0)  # (C, tile)
        if scales is not None:
            self._along, self._down = (
                counts * scales[:, branch, None, None] for branch, counts in enumerate((self._along, self._down))
            )
            self._taken = self._taken * scales[:, 2, None]

    def parts(self, bank: Tensor) -> Tensor:
        """``(C, K)`` to the taps of each branch, ``(C, 3, P)``."""
        n, channels = self._n, len(bank)
        tiles = bank.view(channels, self._tiles, n * n)
        rows = (self._along.mT @ tiles).view(channels, -1, n, n).transpose(1, 2).flatten(1)
        columns = (self._down.mT @ tiles).flatten(1)
        parts = bank.new_zeros(channels, 3, 2 * rows.shape[1])
        parts[:, 0, : rows.shape[1]], parts[:, 1, rows.shape[1] :] = rows, columns
        parts[:, 2, self._twins] = (self._taken[:, None] @ tiles)[:, 0]
        return parts

    def gather(self, values: Tensor) -> Tensor:
        """The transpose of :meth:`parts`, of Q columns: contiguous ``(C, P, Q)`` to ``(C, 3, K, Q)``."""
        n, tiles, (channels, count, columns) = self._n, self._tiles, values.shape
        gathered = values.new_empty(channels, 3, tiles, n, n, columns)
        of_rows = values[:, : count // 2].view(channels, n, tiles, n * columns)
        for i in range(n):
            gathered[:, 0, :, i] = (self._along @ of_rows[:, i]).view(channels, tiles, n, columns)
        of_columns = values[:, count // 2 :].view(channels, tiles, n * n * columns)
        gathered[:, 1] = (self._down @ of_columns).view(channels, tiles, n, n, columns)
        small = values[:, self._twins].view(channels, 1, n, n, columns)
        torch.mul(self._taken[:, :, None, None, None], small, out=gathered[:, 2])
        return gathered.view(channels, 3, tiles * n * n, columns)

    def added(self, values: Tensor) -> Tensor:
        """What :meth:`gather` gives, of all branches together: ``(C, K, Q)``."""
        return self.gather(values).sum(1)

    def products(self, gram: Tensor) -> Tensor:
        """G ``(C, P, P)`` to the products of all branches at all taps: G times the map, ``(C, P, K)``."""
        return self.added(gram).mT.contiguous()

    def normal(self, products: Tensor) -> Tensor:
        """Of :meth:`products`: the matrix of the normal equations, ``(C, K, K)``."""
        return self.added(products)

    def by_branch(self, gram: Tensor) -> Tensor:
        """G ``(C, P, P)`` to the parts of the normal equations' matrix for every two branches, ``(C, 3, 3, K, K)``."""
        products = self.gather(gram).flatten(1, 2).mT.contiguous()
        return self.gather(products).unflatten(3, (3, -1)).transpose(2, 3).contiguous()
