"""Operators: each public function, its reference in plain PyTorch, and its registration with torch.library."""

from sw_transplant.ops.shift_add import shift_add
from sw_transplant.ops.shift_add_reference import shift_add_backward_reference, shift_add_reference
from sw_transplant.ops.toeplitz import toeplitz_conv
from sw_transplant.ops.toeplitz_reference import toeplitz_conv_reference

__all__ = [
    "shift_add",
    "shift_add_backward_reference",
    "shift_add_reference",
    "toeplitz_conv",
    "toeplitz_conv_reference",
]
