"""One branch of a Shiftwise module: a bank of tiles, their placements, and what follows the shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .equivalence import assembly_index, grid_placements, lay_out, support
from .forms import Placed
from .geometry import BranchGeometry, Extent, Size


class Branch(nn.Module):
    """A bank of tiles, their placements, and optionally a bias and a BatchNorm that follow the shift.

    Args:
        geometry: the kernel that the tiles make.
        bank: ``(C_out, T, n, n)``: a Parameter, or a plain tensor that is not trained (the identity).
        placements: ``(P, 3)`` or ``(C_out, P, 3)`` int32, rows ``(tile, dy, dx)``.
        bias: ``(C_out,)`` Parameter added before the BatchNorm, or None.
        bn: a BatchNorm over C_out channels, or None.
    """

    bank: Tensor
    placements: Tensor
    index: Tensor
    support: Tensor | None
    bias: nn.Parameter | None
    bn: nn.Module | None

    def __init__(
        self,
        geometry: BranchGeometry,
        bank: Tensor,
        placements: Tensor,
        bias: nn.Parameter | None = None,
        bn: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        if isinstance(bank, nn.Parameter):
            self.bank = bank
        else:
            self.register_buffer("bank", bank)
        table = placements if placements.dim() == 3 else placements[None]
        self.register_buffer("placements", table.to(bank.device))
        self.register_parameter("bias", bias)
        self.bn = bn
        self._follow(table)

    def _follow(self, placements: Tensor) -> None:
        """Derives from the placements which taps add up where, and which lie inside the kernel."""
        _, tiles, tile, _ = self.bank.shape
        index = assembly_index(placements, tiles, tile, self.geometry.kernel_size)
        inside = support(placements, tiles, tile, self.geometry.kernel_size)
        self.register_buffer("index", index.to(self.bank.device), persistent=False)
        # Tiles that reach beyond the kernel are filled with zeros, and stay zero whatever an optimizer does.
        self.register_buffer("support", None if bool(inside.all()) else inside.to(self.bank.device), persistent=False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.placements.is_meta:
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
        bank, _ = lay_out(kernel.detach(), tile)
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
        ones = torch.ones(channels, 1, 1, 1, dtype=like.dtype, device=like.device)
        bank, _ = lay_out(ones, tile)
        return cls(BranchGeometry((1, 1), (0, 0, 0, 0)), bank, grid_placements((1, 1), tile), None, bn)

    @property
    def is_identity(self) -> bool:
        """Whether the branch passes the map on as it is (its bank is no parameter)."""
        return not isinstance(self.bank, nn.Parameter)

    @property
    def folds(self) -> bool:
        """Whether the branch is linear as it stands: no BatchNorm, or one that uses its running statistics."""
        return self.bn is None or (not self.bn.training and getattr(self.bn, "running_mean", None) is not None)

    def placed(self, origin: Size, *, fold: bool) -> Placed:
        """The branch as tensors; ``fold`` multiplies the BatchNorm's scale into the tiles, in float32 at least."""
        bank = self.bank if self.support is None else torch.where(self.support, self.bank, 0)
        if fold and self.bn is not None:
            scale, _ = _batch_norm_affine(self.bn)
            bank = (bank.to(scale.dtype) * scale[:, None, None, None]).to(bank.dtype)
        extent = Extent(self.geometry.kernel_size, origin, self.geometry.dilation)
        return Placed(bank, self.placements, self.index, extent)

    def folded_bias(self) -> Tensor | None:
        """What the branch adds to every position, ``(C_out,)``: its bias through its BatchNorm; None for nothing."""
        if self.bn is None:
            return self.bias
        scale, offset = _batch_norm_affine(self.bn)
        return offset if self.bias is None else offset + self.bias.to(scale.dtype) * scale

    def extra_repr(self) -> str:
        channels, tiles, n, _ = self.bank.shape
        kh, kw = self.geometry.kernel_size
        dilation = "" if self.geometry.dilation == (1, 1) else f", dilation={self.geometry.dilation}"
        return f"{kh}x{kw} as {tiles} tiles {n}x{n}, {channels} channels, padding={self.geometry.padding}{dilation}"


def _batch_norm_affine(bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Eval-mode BatchNorm as y = scale * x + offset, ``(C,)`` each, in float32 or float64."""
    mean, var = bn.running_mean, bn.running_var
    dtype = torch.promote_types(mean.dtype, torch.float32)  # type: ignore[union-attr, arg-type]
    scale = torch.rsqrt(var.to(dtype) + bn.eps)  # type: ignore[union-attr, operator]
    if bn.weight is not None:
        scale = scale * bn.weight.to(dtype)  # type: ignore[operator]
    offset = -mean.to(dtype) * scale  # type: ignore[union-attr, operator]
    return scale, offset if bn.bias is None else offset + bn.bias.to(dtype)  # type: ignore[operator]
