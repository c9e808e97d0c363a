"""The gradient of large depthwise convolutions with respect to their kernels, as Toeplitz products on tensor cores.

Files as in the package above: plan, settings, product, emit, kernel, launcher.
"""

from sw_transplant.cuda.toeplitz.gradient.launcher import toeplitz_weight_grad, weight_grad_plan_for

__all__ = ["toeplitz_weight_grad", "weight_grad_plan_for"]
