"""The gradient of large depthwise convolutions with respect to their kernels, as Toeplitz products on tensor cores.

The files are named as in the package above, whose pages explain what is common to both. Read in this order:

    plan        what a kernel is compiled for: which products there are, and where everything lies
    settings    which plan to use
    product     the products of a warp: what is multiplied with what
    emit        the products as instructions
    kernel      around the products: tiles into shared memory, sums of diagonals out of it
    launcher    from tensors to a launch, and the sum over its workspace
"""

from sw_transplant.cuda.toeplitz.gradient.launcher import toeplitz_weight_grad, weight_grad_plan_for

__all__ = ["toeplitz_weight_grad", "weight_grad_plan_for"]
