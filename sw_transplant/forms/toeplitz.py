"""Form "toeplitz": the kernels of an output as banded Toeplitz matrices times the map, all in one pass."""

from __future__ import annotations

from torch import Tensor

from sw_transplant.forms.assembled import Convolutions, Sum, add_up, convolutions, run
from sw_transplant.forms.placed import Biases, Call, Outputs
from sw_transplant.ops import toeplitz_conv


def prepare_toeplitz(outputs: Outputs, call: Call) -> list[Sum | Convolutions]:
    """As for "assembled"; an identity stays beside the kernels, where it costs nothing and is exact in every dtype.

    Products are for stride 1, dilation 1, one filter per channel, and outputs of the size of the map; an output of any
    other kind stays a sum of convolutions.
    """
    sums = [add_up(branches, call, residual=call.stride == (1, 1)) for branches in outputs]
    fits = call.stride == (1, 1) and call.in_size == call.out_size
    return [
        entry
        if fits and entry.kernels and all(kernel.extent.dilation == (1, 1) for kernel in entry.kernels)
        else convolutions(entry, call)
        for entry in sums
    ]


def execute_toeplitz(x: Tensor, plan: list[Sum | Convolutions], biases: Biases, call: Call) -> list[Tensor]:
    """Each output in one operator (:func:`ops.toeplitz_conv`)."""
    return [
        _products(x, entry, bias) if isinstance(entry, Sum) else run(x, entry, bias, call)
        for entry, bias in zip(plan, biases, strict=True)
    ]


def _products(x: Tensor, entry: Sum, bias: Tensor | None) -> Tensor:
    weights = [kernel.weight for kernel in entry.kernels]
    origins = [side for kernel in entry.kernels for side in kernel.extent.origin]
    return toeplitz_conv(x, weights, origins, bias, entry.residual)
