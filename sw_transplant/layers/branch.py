"""One branch of a Shiftwise module: a bank of tiles, their placements, and what follows the shift."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sw_transplant.equivalence import Inverse, assembly_index, grid_placements, inverse_index, lay_out, support
from sw_transplant.forms import Placed
from sw_transplant.geometry import BranchGeometry, Size
from sw_transplant.layers.folding import batch_norm_affine
from sw_transplant.layers.layout import Layout
from sw_transplant.layers.masks import MaskedTiles
from sw_transplant.layers.parameters import take_attributes
from sw_transplant.layers.placed_tiles import PlacedTiles
from sw_transplant.layers.tables import Tables
from sw_transplant.ops.depthwise import is_channels_last


class Branch(PlacedTiles, MaskedTiles, nn.Module):
    """A bank of its own, placements, and optionally a bias and a BatchNorm that follow the shift.

    Args:
        geometry: the kernel that the tiles make.
        bank: ``(C_out, T, n, n)``: a Parameter, or a plain tensor that is not trained (the identity).
        placements: ``(P, 3)`` or ``(C_out, P, 3)`` int32, rows ``(tile, dy, dx)``.
        bias: ``(C_out,)`` Parameter added before the BatchNorm, or None.
        bn: a BatchNorm over C_out channels, or None.
        gain: ``(E,)`` or ``(E, C_out)`` Parameter, one factor for each of E equal shares of the rows (the edges), or
            None for 1.

    Raises:
        ValueError: the rows cannot be shared out to the edges.
    """

    bank: Tensor
    placements: Tensor
    bias: nn.Parameter | None
    bn: nn.Module | None
    gain: nn.Parameter | None

    def __init__(
        self,
        geometry: BranchGeometry,
        bank: Tensor,
        placements: Tensor,
        bias: nn.Parameter | None = None,
        bn: nn.Module | None = None,
        gain: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        rows = placements.shape[-2]
        if gain is not None and rows % len(gain):
            raise ValueError(f"Branch: {rows} rows of placements, expected a multiple of the {len(gain)} edges in gain")
        self.geometry = geometry
        self.register_parameter("gain", gain)
        if isinstance(bank, nn.Parameter):
            self.bank = bank
        else:
            self.register_buffer("bank", bank)
        table = placements if placements.dim() == 3 else placements[None]
        self.register_buffer("placements", table.to(bank.device))
        self.register_parameter("bias", bias)
        self.register_buffer("mask", None)
        self.bn = bn
        self._follow(table)

    def _follow(self, placements: Tensor) -> None:
        """Derives from the placements which taps add up where, and which lie inside the kernel."""
        _, tiles, tile, _ = self.bank.shape
        edges = 1 if self.gain is None else len(self.gain)
        rows = placements.detach().to("cpu", copy=True)  # of its own: the buffer may be written to
        index = edge_indices(rows, edges, tiles, tile, self.geometry.kernel_size)
        inside = support(rows, tiles, tile, self.geometry.kernel_size)
        filled = None if bool(inside.all()) else inside
        inverse = inverse_index(index[0], tiles * tile * tile) if edges == 1 else None
        self._gaps = (True, True) if inverse is None else inverse.gaps
        there = None if inverse is None else inverse.places
        tables = {"placements": rows, "index": index, "support": filled, "inverse": there}
        self._tables = Tables(tables).only_on(self.bank.device)

    def _table(self, name: str) -> Tensor | None:
        return self._tables.on(self.bank.device)[name]

    @property
    def rows(self) -> Tensor:
        return self._table("placements")  # type: ignore[return-value]

    @property
    def index(self) -> Tensor:
        return self._table("index")  # type: ignore[return-value]

    @property
    def support(self) -> Tensor | None:
        """Where tiles lie inside the kernel, ``(G, T, n, n)`` bool; None for everywhere.

        Tiles that reach beyond the kernel are filled with zeros, and stay zero whatever an optimizer does.
        """
        return self._table("support")

    def _apply(self, *args: Any, **kwargs: Any) -> Branch:
        had_values = not self.bank.is_meta
        super()._apply(*args, **kwargs)
        self._tables = self._tables.only_on(self.bank.device)
        if not had_values and not self.bank.is_meta:
            self._fill_constants()
        return self

    @torch.no_grad()
    def _fill_constants(self) -> None:
        """Gives buffers their values that have got memory but no values, by ``to_empty``."""
        self.placements.copy_(self.rows)
        if self.is_identity:
            self.bank.copy_(_identity_tiles(self.bank.shape[0], self.bank.shape[2], self.bank))

    def reset_parameters(self) -> None:
        """Draws kernel and bias as nn.Conv2d does, with the same random numbers; gains are 1, 0, 0, ..."""
        if self.is_identity:
            return
        kernel = self.bank.new_empty(self.bank.shape[0], 1, *self.geometry.kernel_size)
        like_conv = nn.Conv2d(1, 1, 1, bias=self.bias is not None, device="meta")
        like_conv.weight = nn.Parameter(kernel)
        if self.bias is not None:
            like_conv.bias = nn.Parameter(self.bias.detach())  # the same memory
        like_conv.reset_parameters()
        with torch.no_grad():
            self.bank.copy_(self.layout.to_bank(kernel))
            if self.gain is not None:
                self.gain.zero_()[0] = 1

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}placements"] = self.rows.clone()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.placements.is_meta:
            self.rederive()

    def rederive(self) -> None:
        """Makes again what follows from the placements."""
        self._follow(self.placements)

    @classmethod
    def from_kernel(
        cls,
        geometry: BranchGeometry,
        kernel: Tensor,
        tile: int,
        *,
        bias: Tensor | None = None,
        bn: nn.Module | None = None,
        requires_grad: tuple[bool, bool] = (True, True),
    ) -> Branch:
        """Lays out a kernel ``(C_out, 1, kh, kw)``. ``requires_grad`` is that of the kernel and of the bias."""
        # The strides are those that channels_last makes of the one input channel.
        layout = Layout(geometry.kernel_size, tile, channels_last=kernel.stride(1) == 1 < kernel.stride(0))
        bank = layout.to_bank(kernel.detach())
        return cls(
            geometry,
            nn.Parameter(bank, requires_grad=requires_grad[0]),
            grid_placements(geometry.kernel_size, tile),
            None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=requires_grad[1]),
            bn,
        )

    @classmethod
    def identity(cls, channels: int, tile: int, like: Tensor, bn: nn.Module | None = None) -> Branch:
        """The map itself (a 1 x 1 kernel of ones that is not trained), optionally through a BatchNorm."""
        bank = _identity_tiles(channels, tile, like)
        return cls(BranchGeometry((1, 1), (0, 0, 0, 0)), bank, grid_placements((1, 1), tile), None, bn)

    def with_edges(self, edges: int, *, per_channel: bool = False, seed: int = 0) -> Branch:
        """The same function with further edges: each places the tiles in a random order per channel, at gain 0.

        Only for a laid-out branch. The gains, ``(1, 0, ..., 0)``, are a Parameter, so that the new edges can grow in
        training (the paper, "Multi-edge feature shift and fusion"). Where the last tiles reach beyond the kernel, it
        grows to hold them whole: elsewhere in the kernel their taps count.

        Args:
            edges: E, with the one that is there; at least 1.
            per_channel: a gain for each channel, ``(E, C_out)``, instead of ``(E,)``.
            seed: of the orders.

        Returns:
            A new branch with a bank of its own, and the BatchNorm and the bias of this one.

        Raises:
            ValueError: no edges, or a branch that is not laid out.
        """
        channels, tiles, n, _ = self.bank.shape
        grid = self._grid  # (T, 3)
        if edges < 1:
            raise ValueError(f"Branch.with_edges: edges {edges}, expected at least 1")
        if self.is_identity or self.gain is not None or self._is_moved:
            raise ValueError("Branch.with_edges: the branch is not laid out; expected one of Branch.from_kernel(...)")
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.rand(edges - 1, channels, tiles, generator=generator, device="cpu").argsort(-1)
        places = torch.cat([torch.arange(tiles, device="cpu").expand(1, channels, tiles), shuffled])  # (E, C, T)
        rows = torch.cat([grid[:, :1].expand(*places.shape, 1), grid[places][..., 1:]], dim=-1)
        shape = (edges, channels) if per_channel else (edges,)
        gain = torch.zeros(shape, dtype=self.bank.dtype, device=self.bank.device)
        gain[0] = 1
        bank = self.bank.detach() if self.support is None else torch.where(self.support, self.bank.detach(), 0)
        bank = nn.Parameter(bank.clone(), requires_grad=self.bank.requires_grad)
        take_attributes(bank, [self.bank])
        return Branch(
            self.geometry.filled(n),
            bank,
            rows.transpose(0, 1).flatten(1, 2),
            self.bias,
            self.bn,
            nn.Parameter(gain, requires_grad=self.bank.requires_grad),
        )

    @property
    def layout(self) -> Layout:
        """How the kernel lies in the bank, where :meth:`reason_against_setting` has nothing to say."""
        return Layout(self.geometry.kernel_size, self.bank.shape[2], is_channels_last(self.bank))

    def reason_against_setting(self) -> str | None:
        """Why no kernel can be laid out into the bank so that the branch is that kernel; None where one can."""
        if self.is_identity:
            return "it passes the map on as it is"
        if self.bn is not None:
            return "a BatchNorm follows the kernel, and is folded into the weight"
        if self.gain is not None:
            return "several edges place its tiles"
        if self.mask is not None:
            return "a mask leaves tiles out"
        if self._is_moved:
            return "its tiles are not placed side by side"
        return None

    @property
    def _grid(self) -> Tensor:
        return grid_placements(self.geometry.kernel_size, self.bank.shape[2])

    @property
    def _is_moved(self) -> bool:
        rows = self._tables.on(torch.device("cpu"))["placements"]
        return not torch.equal(rows, self._grid[None])  # type: ignore[arg-type]

    @property
    def tile_count(self) -> tuple[int, int]:
        return self.bank.shape[0], self.bank.shape[1]

    @property
    def is_identity(self) -> bool:
        """Whether the branch passes the map on as it is (its bank is no parameter)."""
        return "bank" in self._buffers  # a Parameter may be away: torch.func and parametrizations put tensors there

    def placed(self, origin: Size, *, fold: bool, dense: bool = False) -> list[Placed]:
        """The branch as tensors; ``fold`` multiplies the BatchNorm's scale into the tiles, in float32 at least."""
        tables = self._tables.on(self.bank.device)
        filled = None if dense else tables["support"]
        bank = self.masked(self.bank if filled is None else torch.where(filled, self.bank, 0))
        scaled = fold and self.bn is not None
        if scaled:
            scale, _ = batch_norm_affine(self.bn)  # type: ignore[arg-type]
            bank = (bank.to(scale.dtype) * scale[:, None, None, None]).to(bank.dtype)
        there = tables["inverse"]
        inverse = None if there is None else Inverse(there, self._gaps)
        return self._place(bank, origin, None, self.live_tiles(), scaled=scaled, inverse=inverse)

    def extra_repr(self) -> str:
        channels, tiles, n, _ = self.bank.shape
        kh, kw = self.geometry.kernel_size
        dilation = "" if self.geometry.dilation == (1, 1) else f", dilation={self.geometry.dilation}"
        return f"{kh}x{kw} as {tiles} tiles {n}x{n}, {channels} channels, padding={self.geometry.padding}{dilation}"


def edge_indices(placements: Tensor, edges: int, tiles: int, tile: int, kernel_size: Size) -> Tensor:
    """The assembly index of every edge: equal shares of the rows of ``placements``.

    Args:
        placements: ``(G, E * P, 3)``.
        edges: E; 1 for all rows in one index.
        tiles, tile, kernel_size: as in :func:`equivalence.assembly_index`.

    Returns:
        int64 ``(E, G, Q, kh * kw)``.
    """
    parts = [assembly_index(part, tiles, tile, kernel_size) for part in placements.chunk(edges, dim=-2)]
    depth = max(part.shape[1] for part in parts)
    none = tiles * tile * tile
    return torch.stack([F.pad(part, (0, 0, 0, depth - part.shape[1]), value=none) for part in parts])


def _identity_tiles(channels: int, tile: int, like: Tensor) -> Tensor:
    tiles, _ = lay_out(torch.ones(channels, 1, 1, 1, dtype=like.dtype, device=like.device), tile)
    return tiles
