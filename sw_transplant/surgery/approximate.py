"""Mode ``shiftwise``: the paper's module in the place of large kernels, as close to them as its shared bank allows.

A bank of T tiles that both strips share, and that E edges place in random orders, cannot make every kernel. What it
makes is linear in the bank, so the closest kernel is a least-squares problem per channel
(:mod:`sw_transplant.surgery.sharing`). Of a square kernel it finds the best cross-shaped part. The channels that lose
least by bypassing the module become the ghosts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from sw_transplant.config import OrderRule, SWConfig
from sw_transplant.find.match import Match
from sw_transplant.find.shared import active_count, shared_tile
from sw_transplant.forms import DenseKernel, add_kernels, embed
from sw_transplant.geometry import Extent, enclose
from sw_transplant.layers.parameters import take_attributes
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.surgery.sharing import share


@dataclass(frozen=True)
class SharedSpec:
    """How the module of a converted layer is made: the arguments of :class:`SWConv2d`, and what the conversion kept.

    Attributes:
        energy_kept: share of the original kernel's energy (squared taps, BatchNorm folded) that the new one keeps.
        response_error: where it was calibrated: squared error of the layer's responses on the calibration images,
            relative to those of the original; None where it was not.
        agreement: on how many of how many images that were held out the whole network chose the original's class;
            None where none were.
        orders: by which rule they were first chosen; those of the module are in its state_dict.
    """

    kernel_size: int
    tile: int
    edges: int
    paths: int
    ghosts: tuple[int, ...]
    residual: bool
    seed: int
    energy_kept: float
    response_error: float | None = None
    agreement: tuple[int, int] | None = None
    orders: OrderRule = "random"

    def to_dict(self) -> dict[str, Any]:
        """The specification, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SharedSpec:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: fields are missing, unknown or of the wrong kind.
        """
        try:
            agreement, ghosts = values.get("agreement"), values["ghosts"]
            pair = None if agreement is None else (agreement[0], agreement[1])
            spec = cls(**{**values, "ghosts": tuple(ghosts), "agreement": pair})
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{values!r:.80}: not the description of a shiftwise layer ({error})") from error
        spec._check()
        return spec

    def _check(self) -> None:
        """Raises ValueError for a field of another kind than it should be: a file may say anything."""
        right = {
            **{n: _is_integer(getattr(self, n), 1) for n in ("kernel_size", "tile", "edges", "paths")},
            "ghosts": all(_is_integer(channel, 0) for channel in self.ghosts),
            "residual": isinstance(self.residual, bool),
            "seed": _is_integer(self.seed, 0) and self.seed < 2**32,
            "energy_kept": type(self.energy_kept) in (int, float),
            "response_error": self.response_error is None or type(self.response_error) in (int, float),
            "agreement": self.agreement is None or all(_is_integer(count, 0) for count in self.agreement),
        }
        for name, is_right in right.items():
            if not is_right:
                raise ValueError(f"shiftwise layer: {name}: got {getattr(self, name)!r:.80}; is the file damaged?")

    def build(self, match: Match, *, form: str, device: torch.device, dtype: torch.dtype) -> SWConv2d:
        """The module, with random filters."""
        module = SWConv2d(
            match.out_channels,
            self.kernel_size,
            self.tile,
            edges=self.edges,
            paths=self.paths,
            ghost=self.ghosts or 0.0,
            residual=self.residual,
            stride=match.stride,
            orders=self.orders,
            seed=self.seed,
            form=form,
            match=match,
            device=device,
            dtype=dtype,
        )
        module.spec = self
        return module


def _is_integer(value: object, least: int) -> bool:
    return type(value) is int and value >= least


@torch.no_grad()
def build_shared(original: ShiftwiseConv2d, match: Match, config: SWConfig) -> SWConv2d:
    """The paper's module, initialised from the laid-out form of the same layer.

    Args:
        original: the layer, laid out (exact); it is not changed.
        match: what it replaces; passes :func:`shared.reason_against_sharing`.
        config: of mode ``"shiftwise"``.

    Returns:
        The module, in the mode of ``original``. Its BatchNorms start as the identity, the bias of the original in the
        last of them, so that in eval its kernel is the least-squares one.

    Raises:
        NotImplementedError: a BatchNorm of the original keeps no running statistics.
    """
    kernels, bias = original.kernels()
    target = reduce(add_kernels, kernels)
    tile = shared_tile(config)
    like = next(original.parameters())
    energy = target.weight.double().cpu().square().sum((1, 2, 3))
    # The module of the paper adds its input. A kernel without a marked centre is met better without that.
    solved = []
    for residual in (True, False) if config.residual == "auto" else (config.residual,):
        spec = SharedSpec(
            max(original.kernel_size), tile, config.edge_count, config.paths, (), residual, config.seed, 0.0,
            orders=config.orders,
        )  # fmt: skip
        whole = spec.build(match, form="assembled", device=torch.device("cpu"), dtype=torch.float64)
        solved.append((spec, whole, *_closest(whole, target)))
    spec, whole, bank, kept = max(solved, key=lambda attempt: float((attempt[3] * energy).sum()))

    bypassed = _minus_identity(target).double().cpu().square().sum((1, 2, 3))  # what a ghost would miss
    missed = (1 - kept) * energy
    cheapest = (bypassed - missed).argsort(stable=True)
    ghosts = tuple(sorted(cheapest[: match.out_channels - active_count(match.out_channels, config)].tolist()))
    active = torch.tensor([c for c in range(match.out_channels) if c not in set(ghosts)], device="cpu")
    lost = missed[active].sum() + bypassed[list(ghosts)].sum()
    total = energy.sum()
    share_kept = float(1 - lost / total) if total > 0 else 1.0

    spec = replace(spec, ghosts=ghosts, energy_kept=share_kept)
    module = spec.build(match, form=config.form, device=like.device, dtype=like.dtype)
    orders = (whole.horizontal[:, active], whole.vertical[:, active], whole.identity[:, active])
    module.set_orders(*orders)  # those that the bank was solved for
    split_bank(bank[active], module, config.seed)
    if bias is not None:
        module.norm("identity").bias.copy_(bias[active.to(bias.device)])  # type: ignore[union-attr, operator]
    return finish_shared(module, original)


def finish_shared(module: SWConv2d, original: ShiftwiseConv2d) -> SWConv2d:
    """Gives the module what belongs to the layer beside its values: parameters' attributes, mode, whether it trains."""
    for path in module.paths:
        take_attributes(path.weight, [branch.bank for branch in original.parts() if not branch.is_identity])
    trained = any(parameter.requires_grad for parameter in original.parameters())
    module.requires_grad_(trained).train(original.training)
    return module


def _minus_identity(kernel: DenseKernel) -> Tensor:
    """The kernel less the map itself, which ghosts and the module's residual pass on anyway."""
    one = Extent((1, 1), (0, 0))
    outer = enclose(kernel.extent, one)
    ones = DenseKernel(kernel.weight.new_ones(kernel.weight.shape[0], 1, 1, 1), one)
    return embed(kernel, outer) - embed(ones, outer)


def _closest(module: SWConv2d, target: DenseKernel) -> tuple[Tensor, Tensor]:
    """Bank ``(C, T, n, n)`` and share of the target's energy kept ``(C,)``, for a float64 module without ghosts."""
    outer = enclose(target.extent, module.extent)
    wanted = embed(target, outer).double().cpu()
    first, *others = module.paths
    for path in others:
        path.weight.zero_()

    def assemble(bank: Tensor) -> Tensor:
        first.weight.copy_(bank.reshape_as(first.weight))
        return embed(reduce(add_kernels, module._dense()), outer)

    tiles, tile = module.tiles, module.tile
    nothing = torch.zeros(module.out_channels, tiles, tile, tile, dtype=torch.float64, device="cpu")
    constant = assemble(nothing)  # the residual
    bank, kept_of_rest = share(wanted - constant, lambda b: assemble(b) - constant, tiles, tile)
    missed = (1 - kept_of_rest) * (wanted - constant).square().sum((1, 2, 3))
    energy = wanted.square().sum((1, 2, 3))
    return bank, torch.where(energy > 0, 1 - missed / energy.clamp(min=torch.finfo(torch.float64).tiny), 1.0)


def split_bank(bank: Tensor, module: SWConv2d, seed: int) -> None:
    """Shares a bank out to the parallel paths: equal parts, plus noise of deviation 0.02 that adds up to nothing.

    Without the noise the paths would have the same gradients for ever, and be one.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(module.paths)
    noise = torch.randn(count, *bank.shape, generator=generator, dtype=bank.dtype, device="cpu") * 0.02
    noise -= noise.mean(0)
    for path, part in zip(module.paths, noise, strict=True):
        path.weight.copy_((bank / count + part).reshape_as(path.weight))
