"""Operators: each public function, its reference in plain PyTorch, and its registration with torch.library.

Read in this order:

    shift_add_reference    the paper's operator in plain PyTorch: the definition of the next
    shift_add              shift and add, as an operator that takes a kernel where there is one
    shift_add_cpu          the kernel for the CPU; the one for the GPU is in room cuda
    whole_map              a small map times the Toeplitz matrix of a kernel, one product per channel
    depthwise              PyTorch's own convolution, in the layout in which it is fast, and its weight gradient
    toeplitz_reference     the sum of large convolutions in plain PyTorch: the definition of the next
    toeplitz               the same in one pass, as an operator that takes a kernel where there is one
    toeplitz_formats       in which memory format it runs, and when a copy is made
    direct                 operators without the dispatcher, where nobody listens
    toeplitz_autograd      its gradients, of any order
    toeplitz_selftest      whether a device has its kernels, and whether they are right there
    tracing                what compilers need to be told, and whether torch.func is at work
"""

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
