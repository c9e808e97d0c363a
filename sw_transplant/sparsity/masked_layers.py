"""What dynamic sparsity can take out of use in a model, layer by layer, and how much of it is in use."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sw_transplant.find.match import NoLargeKernelError
from sw_transplant.layers.branch import Branch
from sw_transplant.layers.masks import MaskedTiles
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.layers.zeros import ELEMENT_MASK, ORDINARY
from sw_transplant.tables import render_table


@dataclass(frozen=True, eq=False)
class MaskedLayer:
    """A weight in units that are in use or not, as a mask says.

    Attributes:
        path: of the module that owns weight and mask.
        owner: a :class:`Branch` or a path of a :class:`SWConv2d` (the unit is one n x n filter of one channel), or an
            ordinary convolution or linear layer (the unit is one weight).
        large: whether it is a large kernel: a bank of more than one tile per channel.
        by_weight: the unit is one weight whatever the owner is, with a mask beside the bank, as in SLaK's programs.
    """

    path: str
    owner: nn.Module
    large: bool
    by_weight: bool = False

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that the mask is for."""
        return self.owner.bank if isinstance(self.owner, Branch) else self.owner.weight  # type: ignore[return-value]

    @property
    def mask(self) -> Tensor | None:
        """bool, of the shape :attr:`units`; None where all are in use."""
        mask: Tensor | None = getattr(self.owner, "mask" if self.in_filters else ELEMENT_MASK, None)
        return mask

    @property
    def mask_in_use(self) -> Tensor:
        """:attr:`mask`, which has to be there.

        Raises:
            ValueError: it is gone.
        """
        mask = self.mask
        if mask is None:
            raise ValueError(
                f"{self.path}: its mask is gone, expected the one that FilterSparsity made; make a new one"
            )
        return mask

    @property
    def in_filters(self) -> bool:
        """Whether the unit is a filter, which the owner itself leaves out."""
        return isinstance(self.owner, MaskedTiles) and not self.by_weight

    @property
    def possible(self) -> Tensor:
        """Which units lie inside the kernel, bool, of the shape :attr:`units`: taps beyond it are zero for good."""
        ones = torch.ones(self.units, dtype=torch.bool, device=self.weight.device)
        support = getattr(self.owner, "support", None) if self.by_weight else None
        return ones if support is None else ones & support.to(ones.device)

    @property
    def units(self) -> tuple[int, ...]:
        """``(C, T)`` for a bank, the shape of the weight for an ordinary layer."""
        return self.owner.tile_count if self.in_filters else tuple(self.weight.shape)  # type: ignore[return-value, union-attr]

    def create_mask(self) -> None:
        """Gives the owner a mask, all in use, where it has none."""
        if self.mask is not None:
            return
        mask = self.possible
        if self.in_filters:
            self.owner.set_mask(mask)  # type: ignore[operator]
        else:
            self.owner.register_buffer(ELEMENT_MASK, mask)

    def sums(self, values: Tensor) -> Tensor:
        """``sum(|values|)`` over each unit, in float32 at least. ``values`` has the shape of the weight."""
        magnitude = values.detach().abs()
        return magnitude.to(torch.promote_types(magnitude.dtype, torch.float32)).reshape(*self.units, -1).sum(-1)

    def means(self, values: Tensor) -> Tensor:
        """``mean(|values|)`` over each unit; of a tile that reaches beyond its kernel, over the part inside."""
        support = getattr(self.owner, "support", None) if self.in_filters else None
        taps = self.weight.numel() // math.prod(self.units) if support is None else support.sum((-2, -1)).clamp(min=1)
        return self.sums(values) / taps

    def spread(self, units: Tensor) -> Tensor:
        """A value for each unit -> the same for each of its weights, in the shape of the weight."""
        return units.reshape(-1, 1).expand(-1, self.weight.numel() // units.numel()).reshape(self.weight.shape)


def masked_layers(model: nn.Module, *, only_L: bool = True) -> list[list[MaskedLayer]]:
    """The weights that can be masked, in groups: the parallel paths of one module stand together.

    Args:
        model: any module.
        only_L: large kernels only; else also ordinary convolutions and linear layers, and the banks that hold one tile
            per channel (the small kernels beside the large ones).

    Returns:
        Groups of layers with the same units, in the order of the model. A parameter that modules share comes once.
    """
    paths = {module: path for path, module in model.named_modules()}
    groups: list[list[MaskedLayer]] = []
    seen: set[nn.Parameter] = set()
    for module, path in paths.items():
        if isinstance(module, SWConv2d):
            group = [MaskedLayer(paths[bank], bank, True) for bank in module.paths]
        elif isinstance(module, Branch) and not module.is_identity:
            by_weight = module.mask is None and hasattr(module, ELEMENT_MASK)
            group = [MaskedLayer(path, module, module.tile_count[1] > 1, by_weight)]
        elif isinstance(module, ORDINARY) and isinstance(module._parameters.get("weight"), nn.Parameter):
            group = [MaskedLayer(path, module, False)]
        else:
            continue
        group = [layer for layer in group if layer.weight not in seen]
        seen.update(layer.weight for layer in group)
        if group and (group[0].large or not only_L):
            groups.append(group)
    return groups


def trainable_layers(model: nn.Module, *, only_L: bool = True) -> list[list[MaskedLayer]]:
    """:func:`masked_layers` without those that are frozen.

    Raises:
        NoLargeKernelError: nothing is left.
        NotImplementedError: parameters that are sharded over processes.
    """
    groups = masked_layers(model, only_L=only_L)
    trainable = [kept for group in groups if (kept := [layer for layer in group if layer.weight.requires_grad])]
    if not trainable:
        found = f"{sum(map(len, groups))} layers, all frozen" if groups else "no layer"
        what = "large kernels" if only_L else "convolutions and linear layers"
        raise NoLargeKernelError(
            f"FilterSparsity: {found} to mask, expected trainable {what}; convert the model first with convert(model)"
        )
    for layer in (layer for group in trainable for layer in group):
        if hasattr(layer.weight, "device_mesh"):
            raise NotImplementedError(
                f"{layer.path}: its weight is sharded over processes (FSDP), expected whole parameters; "
                "train with DistributedDataParallel"
            )
    return trainable


def of_first_rank(masks: dict[MaskedLayer, Tensor]) -> dict[MaskedLayer, Tensor]:
    """Gives all ranks the masks of rank 0, for the same layers in the same order; a lone process keeps its own."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return masks
    device = next(iter(masks.values())).device
    together = torch.cat([mask.flatten().to(device, torch.uint8) for mask in masks.values()])
    dist.broadcast(together, src=0)
    parts = together.split([mask.numel() for mask in masks.values()])
    return {
        layer: part.view(mask.shape).to(mask.device, torch.bool)
        for (layer, mask), part in zip(masks.items(), parts, strict=True)
    }


# ---- report ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Density:
    """How much of a layer, a stage or a model is in use.

    Attributes:
        path: of the layer or the stage.
        unit: ``"filter"`` or ``"weight"``.
        total, in_use: numbers of units.
    """

    path: str
    unit: str
    total: int
    in_use: int

    @property
    def density(self) -> float:
        """The share in use, 0 to 1."""
        return self.in_use / self.total

    def to_dict(self) -> dict[str, Any]:
        """The fields and the density, ready for JSON."""
        return {**self.__dict__, "density": self.density}


@dataclass(frozen=True)
class SparsityReport:
    """The result of :func:`sparsity_report`. ``print(report)`` shows it as tables.

    Attributes:
        layers: one entry for each layer; each parallel path is one.
        stages: one entry for each stage (the path up to its first number) and unit.
        totals: one entry for each unit, filters first.
    """

    layers: tuple[Density, ...]
    stages: tuple[Density, ...]
    totals: tuple[Density, ...]

    def to_dict(self) -> dict[str, Any]:
        """Dicts, lists, strings and numbers, ready for JSON."""
        return {name: [entry.to_dict() for entry in entries] for name, entries in self.__dict__.items()}

    def __str__(self) -> str:
        headers = ["unit", "in use", "of", "density"]
        layers = render_table("In use, by layer", ["layer", *headers], [_row(entry) for entry in self.layers])
        stages = render_table(
            "In use, by stage", ["stage", *headers], [_row(entry) for entry in (*self.stages, *self.totals)]
        )
        return f"{layers}\n{stages}"


def sparsity_report(model: nn.Module) -> SparsityReport:
    """How many filters are in use: per layer, per stage and in all.

    Args:
        model: any module, with masks or without. Large kernels are listed in any case; ordinary layers and small
            kernels where they have a mask.

    Example:
        >>> print(sparsity_report(model))                                                    # doctest: +SKIP
        In use, by layer
         layer                              unit     in use     of   density
         stages.0.blocks.0.spatial.paths.0  filter      724   1054    68.69%
        ...
    """
    layers = [
        Density(
            layer.path or "(the model)",
            "filter" if layer.in_filters else "weight",
            int(layer.possible.sum()),
            int(layer.possible.sum()) if layer.mask is None else int(layer.mask.sum()),
        )
        for group in masked_layers(model, only_L=False)
        for layer in group
        if layer.large or layer.mask is not None
    ]
    return SparsityReport(
        tuple(layers),
        _added([(_stage(layer.path), layer) for layer in layers]),
        _added([("all", layer) for layer in sorted(layers, key=lambda layer: layer.unit)]),
    )


def _stage(path: str) -> str:
    found = re.match(r"(?:.*?\.)??\d+(?=\.|$)", path)
    return found.group() if found else "(no stage)"


def _added(named: Sequence[tuple[str, Density]]) -> tuple[Density, ...]:
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for name, layer in named:
        total, in_use = sums.get((name, layer.unit), (0, 0))
        sums[name, layer.unit] = total + layer.total, in_use + layer.in_use
    return tuple(Density(name, unit, *counts) for (name, unit), counts in sums.items())


def _row(entry: Density) -> list[str]:
    return [entry.path, entry.unit, f"{entry.in_use:,}", f"{entry.total:,}", f"{entry.density:.2%}"]
