"""How far each converted layer is from exact arithmetic, beside the bound that is proven for it.

A sum of n products, rounded after every step and added in any order, is within ``n * u`` times the sum of the products'
absolute values of the exact sum, where u is the unit roundoff of the arithmetic. A depthwise convolution is such a sum
for every number of its output, whichever form computes it; n is its number of taps and a few for bias and BatchNorm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sw_transplant.layers.branch import Branch
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.layers.sw_conv2d import SWConv2d

FOLDING = 8
"""Roundings on the way of a BatchNorm into a kernel and a bias: a sum, a root, a quotient, products, a difference."""
TF32_ROUNDOFF = 2.0**-11


@dataclass(frozen=True)
class LayerRounding:
    """One converted layer: what it is, how it ran, and its rounding.

    Attributes:
        path: of the layer.
        replaced: the class that it took the place of; None where that is not known.
        kernels: taps of the kernels of its branches.
        tiles: per branch, how many tiles and their side.
        form, ran, because: the form asked for, the one that ran, and why.
        dtype: of its output.
        shape: of the map that it got, ``(B, C, H, W)``.
        terms: n, what is added up for one number of the output.
        bound: ``n * u``: the largest error relative to the sum of absolute values; None for the paper's module.
        largest_error: the largest such error among all numbers of the output, against float64.
    """

    path: str
    replaced: str | None
    kernels: tuple[tuple[int, int], ...]
    tiles: tuple[tuple[int, int], ...]
    form: str
    ran: str
    because: str
    dtype: str
    shape: tuple[int, ...]
    terms: int
    bound: float | None
    largest_error: float | None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerRounding:
        """One entry of a certificate."""
        return cls(**{name: _tuples(value) for name, value in values.items() if name != "ok"})

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound; True where there is none."""
        return self.bound is None or (self.largest_error is not None and self.largest_error <= self.bound)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def measure_layers(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[LayerRounding, ...]:
    """Runs a model, and looks at every call of its converted layers.

    Args:
        model: in eval mode; it stays as it is.
        run: calls the model.

    Returns:
        The layers that were reached, in the order of the model; of several calls of one, the largest error.
    """
    found: dict[str, LayerRounding] = {}
    layers = {path: module for path, module in model.named_modules() if isinstance(module, ShiftwiseConv2d)}

    def look(path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            record = _measure(path, cast("ShiftwiseConv2d", module), arguments[0], output)
            before = found.get(path)
            if before is None or not (record.largest_error or 0.0) <= (before.largest_error or 0.0):
                found[path] = record

        return hook

    hooks = [module.register_forward_hook(look(path)) for path, module in layers.items()]
    try:
        with torch.no_grad():
            run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(found[path] for path in layers if path in found)


@torch.no_grad()
def _measure(path: str, layer: ShiftwiseConv2d, x: Tensor, y: Tensor) -> LayerRounding:
    branches = [] if isinstance(layer, SWConv2d) else cast("list[Branch]", list(layer.branches))
    decision = layer.decision
    terms = sum(_terms(branch) for branch in branches)
    bound = error = None
    if branches:
        bound = _bound(terms + 2 * (y.dtype != x.dtype), y.dtype, y.device)  # autocast rounds map and kernel
        error = _largest_error(layer, x, y, terms)
    return LayerRounding(
        path=path,
        replaced=None if layer.match is None else layer.match.type_name,
        kernels=tuple(branch.geometry.kernel_size for branch in branches),
        tiles=tuple((branch.bank.shape[1], branch.bank.shape[2]) for branch in branches),
        form=layer.form,
        ran="" if decision is None else decision.form,
        because="" if decision is None else decision.reason,
        dtype=str(y.dtype).removeprefix("torch."),
        shape=tuple(x.shape),
        terms=terms,
        bound=bound,
        largest_error=error,
    )


def _terms(branch: Branch) -> int:
    kh, kw = branch.geometry.kernel_size
    edges = 1 if branch.gain is None else 2 * len(branch.gain)  # a product with the gain for each
    taps = 1 if branch.is_identity else kh * kw * edges
    return taps + (branch.bias is not None) + (FOLDING if branch.bn is not None else 0)


def _bound(terms: int, dtype: torch.dtype, device: torch.device) -> float:
    roundoff = torch.finfo(dtype).eps / 2
    bound = terms * roundoff
    if dtype is torch.float64:
        return 2 * bound  # what it is compared with is rounded as well
    if dtype is torch.float32 and device.type == "cuda":
        backends = torch.backends
        precisions = (backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision)  # type: ignore[attr-defined]
        return bound + (2 * TF32_ROUNDOFF if "tf32" in precisions else 0.0)
    return bound


def _largest_error(layer: ShiftwiseConv2d, x: Tensor, y: Tensor, terms: int) -> float:
    """The largest error over the sum of absolute values; infinite where one is not finite that should be."""
    host = torch.device("cpu") if x.device.type == "mps" else x.device  # MPS has no float64
    given = x.detach().to(host).double()
    exact = _in_float64(layer, host)(given)
    absolute = _majorant(_in_float64(layer, host))(given.abs())
    underflow = terms * torch.finfo(y.dtype).smallest_normal * torch.finfo(y.dtype).eps
    error = ((y.detach().to(host).double() - exact).abs() - underflow).clamp_min(0)
    share = torch.where(error == 0, 0.0, error / absolute)
    largest = share.max().item() if share.numel() else 0.0
    return largest if largest == largest else float("inf")


def _in_float64(layer: ShiftwiseConv2d, device: torch.device) -> ShiftwiseConv2d:
    made = copy.deepcopy(layer)
    made._forward_hooks.clear()
    made.frozen = False
    made = made.to(device=device, dtype=torch.float64).eval()
    made.form = "assembled"
    return made


def _majorant(layer: ShiftwiseConv2d) -> ShiftwiseConv2d:
    """The layer with every number replaced by its absolute value, BatchNorm's mean added instead of subtracted."""
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if tensor.is_floating_point():
            tensor.copy_(-tensor.abs() if name.endswith("running_mean") else tensor.abs())
    layer.clear_cache()
    return layer
