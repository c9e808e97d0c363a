"""Form "toeplitz": the kernels of an output as banded Toeplitz matrices times the map, all in one pass."""

from __future__ import annotations

from torch import Tensor

from sw_transplant.forms.assembled import Sum, add_up, run_sum
from sw_transplant.forms.placed import Biases, Call, Outputs
from sw_transplant.ops import toeplitz_conv


def prepare_toeplitz(outputs: Outputs, call: Call) -> list[Sum]:
    """As for "assembled"; an identity stays beside the kernels, where it costs nothing and is exact in every dtype."""
    return [add_up(branches, call, residual=call.stride == (1, 1)) for branches in outputs]


def execute_toeplitz(x: Tensor, plan: list[Sum], biases: Biases, call: Call) -> list[Tensor]:
    """Each output in one operator (:func:`ops.toeplitz_conv`); as assembled where that does not apply.

    It applies to stride 1, dilation 1, one filter per channel, and outputs of the size of the map.
    """
    fits = call.stride == (1, 1) and call.in_size == call.out_size
    return [
        _products(x, entry, bias) if fits and _is_plain(entry, x.shape[1]) else run_sum(x, entry, bias, call)
        for entry, bias in zip(plan, biases, strict=True)
    ]


def _is_plain(entry: Sum, channels: int) -> bool:
    return bool(entry.kernels) and all(
        kernel.extent.dilation == (1, 1) and kernel.weight.shape[0] == channels for kernel in entry.kernels
    )


def _products(x: Tensor, entry: Sum, bias: Tensor | None) -> Tensor:
    weights = [kernel.weight for kernel in entry.kernels]
    origins = [side for kernel in entry.kernels for side in kernel.extent.origin]
    return toeplitz_conv(x, weights, origins, bias, entry.residual)
