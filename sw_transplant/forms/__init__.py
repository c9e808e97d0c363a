"""The execution forms of a Shiftwise module: exact ways to run the same sum of placed tiles.

A form has two steps. ``prepare`` turns the branches into the tensors that the form multiplies with (a plan, which can
be cached while the parameters stay the same); ``execute`` applies a plan to a feature map. docs/design/forms.md says
what each costs, CONTRIBUTING.md how to add one.

    form        prepare                                             execute
    shift       concatenates distinct banks of equal tile, dilation small convolutions, then shift and add (the paper)
    assembled   puts the tiles at their placements: large kernels   depthwise convolution with these kernels
    toeplitz    the same                                            banded Toeplitz products, in one pass
    gemm        one kernel, as a matrix over the whole map          one matrix product per channel

    form        NaN or infinity at one pixel
    shift       stays where the kernel reaches, rounded up to whole tiles
    assembled   stays where the kernel reaches; of kernels that were joined, the one that encloses them
    toeplitz    may fill its channel of its image: zeros beside the band are multiplied, too
    gemm        fills its channel of its image

``SWConfig(nonfinite="local")`` keeps form "auto" to those where it stays.

Read in this order:

    placed                         what a form is given: placed tiles, and the call
    shift                          the paper's form
    assembled, toeplitz, gemm      those that run large kernels
    guarantees                     what a form keeps to, and what not
    dispatch                       which form runs, and why
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from sw_transplant.forms.assembled import (
    add_kernels,
    dense_kernel,
    embed,
    execute_assembled,
    join_extents,
    join_kernels,
    prepare_assembled,
)
from sw_transplant.forms.gemm import execute_gemm, prepare_gemm
from sw_transplant.forms.placed import Biases, Call, DenseKernel, LiveTiles, Outputs, Placed
from sw_transplant.forms.shift import execute_shift, prepare_shift
from sw_transplant.forms.toeplitz import execute_toeplitz, prepare_toeplitz

__all__ = [
    "FORMS",
    "Biases",
    "Call",
    "DenseKernel",
    "ExecutionForm",
    "LiveTiles",
    "Outputs",
    "Placed",
    "add_kernels",
    "dense_kernel",
    "embed",
    "join_extents",
    "join_kernels",
    "prepare_shift",
]


class ExecutionForm(NamedTuple):
    """The two steps of a form."""

    prepare: Callable[[Outputs, Call], Any]
    execute: Callable[[Tensor, Any, Biases, Call], list[Tensor]]


FORMS: dict[str, ExecutionForm] = {
    "shift": ExecutionForm(prepare_shift, execute_shift),
    "assembled": ExecutionForm(prepare_assembled, execute_assembled),
    "gemm": ExecutionForm(prepare_gemm, execute_gemm),
    "toeplitz": ExecutionForm(prepare_toeplitz, execute_toeplitz),
}
