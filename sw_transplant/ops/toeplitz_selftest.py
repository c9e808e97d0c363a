"""Whether a device has Toeplitz kernels, and whether their results are right: tried once, before they are used."""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from sw_transplant.cuda import launch
from sw_transplant.ops.toeplitz_reference import pairs, toeplitz_conv_reference, toeplitz_weight_grad_reference
from sw_transplant.ops.tracing import constant_when_traced

TF32_ERROR = 2e-3  # relative, of a right result, at most


@constant_when_traced
def why_no_kernel(device: int) -> str:
    """Why `toeplitz_conv` has no kernel on CUDA device number `device`; empty where it has one.

    The first call for a device compiles a kernel and compares its result with PyTorch's. It warns if there is none.
    """
    return _why_no_kernel(device)


@functools.cache
def _why_no_kernel(device: int) -> str:
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        missing = f"needs tensor cores for TF32: compute capability 8.0, not {capability[0]}.{capability[1]}"
        warnings.warn(
            f"sw_transplant: toeplitz {missing}; plain PyTorch is used on cuda:{device} instead: same results, more "
            "slowly.",
            RuntimeWarning,
            stacklevel=2,
        )
        return missing
    if not launch.is_available(device):  # which warns
        return "needs Numba's CUDA kernels, which do not run here"
    return self_test(torch.device("cuda", device))


@functools.cache
def self_test(device: torch.device) -> str:
    """What is wrong with the kernel of `toeplitz_conv` on a device, also as a warning; empty if nothing is."""
    x, _, weights, sizes, origins = _trial()
    expected = [toeplitz_conv_reference(x, weights, origins)]

    def run() -> list[Tensor]:
        from sw_transplant.cuda import toeplitz as kernels

        there = x.to(device)
        plan = kernels.plan_for(there, pairs(sizes), pairs(origins))
        if plan is None:
            return expected
        out = torch.empty_like(there)
        kernels.toeplitz_conv_forward(there, [weight.to(device) for weight in weights], None, False, plan, out)
        return [out]

    return _problem("toeplitz", device, run, expected)


@functools.cache
def weight_grad_self_test(device: torch.device) -> str:
    """The same for the kernel of `toeplitz_weight_grad`."""
    x, grad, _, sizes, origins = _trial()
    expected = toeplitz_weight_grad_reference(x, grad, sizes, origins)

    def run() -> list[Tensor]:
        from sw_transplant.cuda import toeplitz as kernels

        there = x.to(device)
        plan = kernels.weight_grad_plan_for(there, pairs(sizes), pairs(origins))
        return expected if plan is None else kernels.toeplitz_weight_grad(there, grad.to(device), plan)

    return _problem("the weight gradient of toeplitz", device, run, expected)


def weight_grad_is_wrong(device: torch.device) -> bool:
    """Whether the kernel of the weight gradient is known to be wrong; it cannot be tried while a graph is captured."""
    return not torch.cuda.is_current_stream_capturing() and bool(weight_grad_self_test(device))


def _trial() -> tuple[Tensor, Tensor, list[Tensor], list[int], list[int]]:
    """A map, the gradient of an output, kernels, their sizes and origins, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 2, 3, 20, 23, generator=generator, device="cpu")
    sizes, origins = [11, 3, 3, 11], [5, 1, 1, 5]
    weights = [torch.randn(3, 1, *size, generator=generator, device="cpu") for size in pairs(sizes)]
    return x, grad, weights, sizes, origins


def _problem(what: str, device: torch.device, run: Callable[[], list[Tensor]], expected: list[Tensor]) -> str:
    """Why what runs on a device does not give what is expected; empty if it does. Warns."""
    try:
        errors = [
            ((got.cpu() - right).norm() / right.norm()).item() for got, right in zip(run(), expected, strict=True)
        ]
        fine = all(error <= TF32_ERROR for error in errors)  # not so for NaN
        problem = "" if fine else f"is wrong on {device}: relative errors {', '.join(f'{e:.2g}' for e in errors)}"
    except Exception as reason:
        problem = f"fails on {device}: {type(reason).__name__}: {' '.join(str(reason).split())[:200]}"
    if problem:
        warnings.warn(
            f"sw_transplant: {what} {problem}; plain PyTorch is used instead. Please report this.",
            RuntimeWarning,
            stacklevel=2,
        )
    return problem
