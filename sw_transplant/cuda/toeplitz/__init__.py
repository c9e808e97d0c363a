"""Large depthwise convolutions as Toeplitz products on tensor cores.

Read in this order:

    plan        what a kernel is compiled for: geometry, and where everything lies in shared memory
    settings    which plan to use
    product     the products of a warp: what is multiplied with what
    tally       the products, counted
    emit        the products as instructions
    words       a few instructions that Numba does not have
    staging     from global to shared memory
    epilogue    from shared to global memory
    kernel      around the products: turns of staging, products and epilogue
    division    how many thread blocks share the work
    launcher    from tensors to a launch
    gradient    the same for the gradient of the kernels
"""

from sw_transplant.cuda.toeplitz.gradient import toeplitz_weight_grad, weight_grad_plan_for
from sw_transplant.cuda.toeplitz.launcher import plan_for, toeplitz_conv_forward

__all__ = ["plan_for", "toeplitz_conv_forward", "toeplitz_weight_grad", "weight_grad_plan_for"]
