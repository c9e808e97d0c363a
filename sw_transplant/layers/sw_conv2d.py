"""The paper's module: one bank of small filters, placed along rows and columns by several edges, in random orders.

ShiftwiseConv, "Method" (multi-edge shift and fusion, shared bank, ghost channels, BatchNorm after the shift). For an
active channel c and the sum of all paths, T = ceil(M / N) tiles N x N, each edge adds its tiles up to a strip:

    strip[c, :, place * N + i] += tile[c, t, :, i]     place = order[edge, c, t]

along the row (horizontal branch), and with another order along the column (vertical branch). The identity branch takes
one tile per edge and channel without a shift. Each branch has a BatchNorm; the input is added to their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from sw_transplant.config import OrderRule
from sw_transplant.forms import DenseKernel, LiveTiles
from sw_transplant.geometry import BranchGeometry, Extent, Size
from sw_transplant.layers.ghosts import place_channels
from sw_transplant.layers.masks import LiveMemo
from sw_transplant.layers.order_buffers import OrderBuffers
from sw_transplant.layers.orders import (
    BRANCHES,
    PUBLISHED_SEED,
    strip_geometries,
)
from sw_transplant.layers.placed_tiles import PlacedTiles
from sw_transplant.layers.shared_bank import BranchView, TilePath
from sw_transplant.ops.depthwise import layout_of

Gain = Literal["edge", "channel"]


class SWConv2d(OrderBuffers):
    """The paper's SW module: a drop-in for a depthwise convolution that keeps height and width (divided by the stride).

        y[active] = BN(horizontal) + BN(vertical) + BN(identity) + x[active],    y[ghosts] = x[ghosts]

    The convolutions are padded by N - 1 on both axes, as published, so that every position where a filter overlaps the
    map has a response. Hence all execution forms give the same function, at the borders too, and
    :func:`sw_transplant.surgery.merge` turns the module into two strips, paths, edges, BatchNorms and ghosts included.

    Args:
        channels: of input and output.
        kernel_size: length M of the strips that the tiles make (the paper: 51, 49, 47, 13).
        tile: side N of the filters (the paper: 3; 5 in its first experiments).
        edges: E, how many orders place the bank in each branch (the paper: 4).
        paths: how many banks are summed before the shift (the paper's Rep, 2). In eval they equal one.
        ghost: the fraction of channels that bypass the module (the paper: 0.23), drawn with the seed
            (:func:`orders.active_channels`); or these channels themselves; 0 for none.
        ghosts_last: order of the output: True as published (the active channels, then the ghosts), False in place.
        residual: add the input to the sum of the branches, as published.
        gain: what multiplies each edge of each branch: ``None`` nothing, ``"edge"`` a Parameter ``gain`` ``(3, E)``,
            ``"channel"`` one ``(3, E, active)``, in the order of :data:`BRANCHES`; ones at the start.
        masked: give every path a mask of its filters, all in use (:class:`TilePath`).
        stride: of the output.
        orders: ``"random"``, one for each edge and branch, as in the final networks; ``"opposite"``, those of the first
            ones, which have one edge: the tiles in order along rows, in reverse order along columns.
        seed: of the ghosts and of the orders; the state of the global generators is neither used nor changed.
        form, match: as in :class:`ShiftwiseConv2d`.
        device, dtype: of parameters and buffers.

    Shape: ``(B, C, H, W)`` to ``(B, C, ceil(H / sh), ceil(W / sw))``.

    State: ``paths.<i>.weight`` ``(active * T, 1, N, N)``; ``bn_horizontal``, ``bn_vertical``, ``bn_identity``; buffers
    ``horizontal`` and ``vertical`` ``(E, active, T)``, the place of each tile, ``identity`` ``(E, active)``, the tile
    taken, and ``active`` ``(active,)``, the channels in ascending order; optionally ``gain`` and ``paths.<i>.mask``.
    What is loaded or assigned to the orders takes effect with ``load_state_dict`` or :meth:`set_orders`.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> SWConv2d(32, 51)(torch.zeros(1, 32, 14, 14)).shape
        torch.Size([1, 32, 14, 14])
    """

    NAMES: ClassVar[dict[str, str]] = {"paths": "paths", **{branch: f"bn_{branch}" for branch in BRANCHES}}
    """What the parts are called in the state_dict; a subclass may choose other names."""

    _takes_single_maps = True
    _takes_shortcuts = False  # the ghosts go around the plan
    recompute = "small"  # the identity branch: 2.3 instead of 3.1 times the input are kept in training

    gain: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        tile: int = 3,
        *,
        edges: int = 4,
        paths: int = 2,
        ghost: float | Sequence[int] = 0.23,
        ghosts_last: bool = False,
        residual: bool = True,
        gain: Gain | None = None,
        masked: bool = False,
        stride: int | Size = 1,
        orders: OrderRule = "random",
        seed: int = PUBLISHED_SEED,
        form: str = "auto",
        match: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # the branches of the parent class are views here, not modules
        _check_counts(channels=channels, kernel_size=kernel_size, tile=tile, edges=edges, paths=paths)
        if gain not in (None, "edge", "channel"):
            raise ValueError(f"SWConv2d: gain {gain!r}, expected None, 'edge' or 'channel'")
        if orders not in get_args(OrderRule):
            raise ValueError(f"SWConv2d: orders {orders!r}, expected one of {get_args(OrderRule)}")
        if orders == "opposite" and edges != 1:
            raise ValueError(f"SWConv2d: orders 'opposite' with {edges} edges, all alike; expected edges=1")
        steps = (stride, stride) if isinstance(stride, int) else stride
        self._set_up(channels, channels, steps, form, match)
        self.length, self.tile, self.edges, self.seed = kernel_size, tile, edges, seed
        self.ghosts_last, self.residual, self.order_rule = ghosts_last, residual, orders
        self._geometries = strip_geometries(kernel_size, tile)
        self._ghost = float(ghost) if isinstance(ghost, float | int) else tuple(ghost)
        drawn = self.draw()
        count = len(drawn["active"])

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        banks = [TilePath(count, self.tiles, tile, masked=masked, **factory) for _ in range(paths)]
        setattr(self, self.NAMES["paths"], nn.ModuleList(banks))
        for branch in BRANCHES:
            setattr(self, self.NAMES[branch], nn.BatchNorm2d(count, **factory))
        shape = (len(BRANCHES), edges) if gain == "edge" else (len(BRANCHES), edges, count)
        self.register_parameter("gain", None if gain is None else nn.Parameter(torch.ones(shape, **factory)))
        self._hold_orders(drawn)

    # ---- the parts ----

    @property
    def tiles(self) -> int:
        """T = ceil(M / N), the number of tiles per channel and path."""
        return -(-self.length // self.tile)

    @property
    def merged(self) -> bool:
        """Whether :meth:`reparameterize` has turned the module into plain kernels."""
        return "branches" in self._modules

    @property
    def paths(self) -> Sequence[TilePath]:
        """The parallel banks; none once the kernels are merged. The module itself, so that lookups by path find it."""
        return self._modules.get(self.NAMES["paths"], ())  # type: ignore[return-value]

    def norm(self, branch: str) -> nn.Module:
        """The BatchNorm of a branch: ``"horizontal"``, ``"vertical"`` or ``"identity"``."""
        return self._modules[self.NAMES[branch]]  # type: ignore[return-value]

    @property
    def bank(self) -> Tensor:
        """The sum of the paths ``(active, T, N, N)``, without the filters that are masked."""
        first, *others = [path.bank for path in self.paths]
        for bank in others:
            first = first + bank
        return first

    @property
    def live(self) -> Tensor | None:
        """Which tiles ``(active, T)`` any path uses; None where nothing is masked."""
        masks = [path.mask for path in self.paths if path.mask is not None]
        return torch.stack(masks).any(0) if masks and len(masks) == len(self.paths) else None

    def _live_tiles(self) -> LiveTiles | None:
        """Which tiles the forms may leave out: those that no path has in use, or lets explore."""
        masks = [path.mask for path in self.paths if path.mask is not None]
        if len(masks) < len(self.paths) or any(path.explores for path in self.paths):
            return None
        return self.__dict__.setdefault("_live_memo", LiveMemo())(masks)  # type: ignore[no-any-return]

    @property
    def branches(self) -> Any:
        """The branches: views of the parameters; once the kernels are merged, modules."""
        return self._modules["branches"] if self.merged else self.parts()

    @branches.setter
    def branches(self, modules: nn.ModuleList) -> None:
        self._modules["branches"] = modules

    def parts(self) -> Sequence[PlacedTiles]:
        if self.merged:
            return list(self._modules["branches"])  # type: ignore[call-overload]
        bank, live = self.bank, self._live_tiles()
        views = [
            BranchView(
                geometry,
                bank,
                self._table(f"{name}_placements"),
                self._table(f"{name}_index"),
                self.norm(name),
                None if self.gain is None else self.gain[i],
                live=live,
            )
            for i, (name, geometry) in enumerate(zip(BRANCHES, self._geometries, strict=True))
        ]
        if self.residual:
            one = BranchGeometry((1, 1), (0, 0, 0, 0))
            places = self._table("one_placements"), self._table("one_index")
            views.append(BranchView(one, self.one_bank, *places, None, None, True))
        return views

    @property
    def _like(self) -> Tensor:
        return super()._like if self.merged else self.paths[0].weight

    @property
    def _geometry(self) -> BranchGeometry:
        return super()._geometry if self.merged else self._geometries[0]

    def reset_parameters(self) -> None:
        """Draws ghosts and orders from the seed again, and initialises filters, BatchNorms and gains.

        What a module needs that was built on the meta device and then got memory by ``to_empty``.
        """
        if self.gain is not None:
            nn.init.ones_(self.gain)
        for module in (*self.paths, *(self.norm(branch) for branch in BRANCHES)):
            module.reset_parameters()  # type: ignore[operator]
        self.reset_orders()

    # ---- running ----

    def _run(self, x: Tensor) -> Tensor:
        if not len(self.ghosts):
            return super()._run(x)
        return self._run_among_ghosts(x).contiguous(memory_format=layout_of(x))

    def _run_among_ghosts(self, x: Tensor) -> Tensor:
        if self.merged:  # the ghosts are kernels with a single tap
            return super()._run(x.index_select(1, self.channel_order) if self.ghosts_last else x)  # type: ignore[arg-type]
        active = self._table("active")
        y = super()._run(x.index_select(1, active))
        passed = x[:, :, :: self.stride[0], :: self.stride[1]].to(y.dtype)
        if self.ghosts_last:
            return torch.cat([y, passed.index_select(1, self.ghosts)], dim=1)
        return place_channels(passed, active, y)

    # ---- back to plain convolutions ----

    @property
    def channel_order(self) -> Tensor | None:
        """Which input channel the k-th channel of :meth:`kernels` reads, ``(C,)``; None for the k-th itself."""
        return torch.cat([self._table("active"), self.ghosts]) if self.ghosts_last and len(self.ghosts) else None

    def _whole_bias(self) -> Tensor | None:
        bias = super()._whole_bias()
        return bias if bias is None or self.merged or not len(self.ghosts) else self._among_ghosts(bias)

    def trained(self) -> tuple[list[bool], bool]:
        if self.merged:
            return super().trained()
        any_of_it = any(parameter.requires_grad for parameter in self.parameters())
        return [any_of_it] * len(self.kernels()[0]), any_of_it

    def _dense(self) -> list[DenseKernel]:
        kernels = super()._dense()
        if self.merged or not len(self.ghosts):
            return kernels
        kernels = [DenseKernel(self._among_ghosts(kernel.weight), kernel.extent) for kernel in kernels]
        bypass = self._among_ghosts(torch.zeros_like(self._like[: len(self.active), :, :1, :1]), fill=1)
        return [*kernels, DenseKernel(bypass, Extent((1, 1), (0, 0)))]

    def _among_ghosts(self, values: Tensor, fill: float = 0) -> Tensor:
        """Values of the active channels, ``(active, ...)`` -> ``(C, ...)``, the ghosts filled."""
        active = self._table("active")
        places = torch.arange(len(active), device=values.device) if self.ghosts_last else active
        return values.new_full((self.in_channels, *values.shape[1:]), fill).index_copy(0, places, values)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """As :meth:`ShiftwiseConv2d.reparameterize`: paths, edges, BatchNorms and ghosts become plain kernels."""
        if self.merged:
            return
        super().reparameterize()
        for name in self.NAMES.values():
            del self._modules[name]
        self.gain = None
        for name in [name for name, _ in self.named_buffers(recurse=False) if name != "active"]:
            delattr(self, name)
        self.follow_orders()

    def extra_repr(self) -> str:
        if self.merged:
            return super().extra_repr()
        ghosts = f", {len(self.ghosts)} ghosts" + (" last" if self.ghosts_last else "") if len(self.ghosts) else ""
        stride = "" if self.stride == (1, 1) else f", stride={self.stride}"
        n = self.tile
        return (
            f"{self.in_channels}, strips of {self.length}: {self.tiles} tiles {n}x{n}, edges={self.edges}, "
            f"paths={len(self.paths)}{ghosts}{stride}, form={self.form!r}{', frozen' if self.frozen else ''}"
        )


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"SWConv2d: {name} {value!r}, expected an integer of at least 1")
