"""Whether a device has Toeplitz kernels, and whether their results are right: tried once, before they are used.

The trial is the same whenever it is made: in a thread of its own, where autocast, default devices, inference mode and
modes of dispatch of who asks do not reach, with dtypes that are named. What fails for want of memory is tried again.
There is one for each operator and memory format, made when the first such map comes: a network of contiguous maps does
not wait for kernels of channels_last ones.
"""

import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from sw_transplant.cuda import launch
from sw_transplant.cuda.answers import Passing, Remembered, is_passing
from sw_transplant.ops.toeplitz_reference import pairs, toeplitz_conv_reference, toeplitz_weight_grad_reference
from sw_transplant.ops.tracing import constant_when_traced

TF32_ERROR = 2e-3  # relative, of a right result, at most
NOT_WHILE_CAPTURED = "is not tried while a CUDA graph is captured: call the layer once before that"


@constant_when_traced
def why_no_kernel(device: int) -> str:
    """Why `toeplitz_conv` has no kernel on CUDA device number `device`; empty where it has one.

    The first call for a device compiles a kernel and compares its result with PyTorch's. It warns if there is none.
    """
    return _why_no_kernel(device)


@Remembered
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
        missing = "needs CUDA kernels, which do not run here"
        if not launch.answer_lasts(device):
            raise Passing(missing)
        return missing
    place = torch.device("cuda", device)
    problem = self_test(place)
    if problem and not self_test.lasts(place):
        raise Passing(problem)
    return problem


@Remembered
def self_test(device: torch.device) -> str:
    """What is wrong with the kernel of `toeplitz_conv` for contiguous maps on a device, also as a warning; empty if
    nothing is."""
    return _problem("toeplitz", device, lambda: _convolve(device, torch.contiguous_format))


@Remembered
def self_test_channels_last(device: torch.device) -> str:
    """The same for its kernel for channels_last maps."""
    return _problem("toeplitz of channels_last maps", device, lambda: _convolve(device, torch.channels_last))


@Remembered
def weight_grad_self_test(device: torch.device) -> str:
    """The same for the kernel of `toeplitz_weight_grad` for contiguous maps."""
    return _problem("the weight gradient of toeplitz", device, lambda: _correlate(device, torch.contiguous_format))


@Remembered
def weight_grad_self_test_channels_last(device: torch.device) -> str:
    """The same for its kernel for channels_last maps."""
    what = "the weight gradient of toeplitz of channels_last maps"
    return _problem(what, device, lambda: _correlate(device, torch.channels_last))


SELF_TESTS = {  # whether of the gradient, whether channels_last
    (False, False): self_test,
    (False, True): self_test_channels_last,
    (True, False): weight_grad_self_test,
    (True, True): weight_grad_self_test_channels_last,
}


def is_left_out(device: torch.device, channels_last: bool, gradient: bool = False) -> bool:
    """Whether a kernel is known to be wrong on a device, or cannot be tried now: then it is not used.

    Those for channels_last maps have the products of the ones for contiguous maps, and need these to be right. The
    other way round nothing is lost but the time of copies: contiguous ones of the maps.

    Args:
        device: a CUDA device that has kernels.
        channels_last: the memory format of the maps.
        gradient: of `toeplitz_weight_grad`, instead of `toeplitz_conv`.
    """
    if SELF_TESTS[gradient, False](device):
        return True
    return channels_last and bool(SELF_TESTS[gradient, True](device))


Compared = tuple[list[Tensor], list[Tensor]]  # what kernels gave, and what is right


def _convolve(device: torch.device, layout: torch.memory_format) -> Compared:
    from sw_transplant.cuda import toeplitz as kernels

    x, _, weights, sizes, origins = _trial(layout)
    there = x.to(device).contiguous(memory_format=layout)
    plan = kernels.plan_for(there, pairs(sizes), pairs(origins))
    if plan is None:
        return [], []
    out = torch.empty_like(there)
    kernels.toeplitz_conv_forward(there, [weight.to(device) for weight in weights], None, False, plan, out)
    return [out], [toeplitz_conv_reference(x, weights, origins)]


def _correlate(device: torch.device, layout: torch.memory_format) -> Compared:
    from sw_transplant.cuda import toeplitz as kernels

    x, grad, _, sizes, origins = _trial(layout)
    there, grad_there = (each.to(device).contiguous(memory_format=layout) for each in (x, grad))
    plan = kernels.weight_grad_plan_for(there, grad_there, pairs(sizes), pairs(origins))
    if plan is None:
        return [], []
    expected = toeplitz_weight_grad_reference(x, grad, sizes, origins)
    return kernels.toeplitz_weight_grad(there, grad_there, plan), expected


def _trial(layout: torch.memory_format) -> tuple[Tensor, Tensor, list[Tensor], list[int], list[int]]:
    """A map, the gradient of an output, kernels, their sizes and origins, on the CPU; contiguous."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)

    # Of channels_last maps, more channels than a thread block takes, and no multiple of that; four come at once.
    channels = 20 if layout == torch.channels_last else 3
    x, grad = draw(2, 2, channels, 20, 23)
    sizes, origins = [11, 3, 3, 11], [5, 1, 1, 5]
    return x, grad, [draw(channels, 1, *size) for size in pairs(sizes)], sizes, origins


def _problem(what: str, device: torch.device, trial: Callable[[], Compared]) -> str:
    """Why a trial on a device does not give what is expected; empty if it does. Warns.

    Raises:
        Passing: it may be otherwise at the next call.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise Passing(NOT_WHILE_CAPTURED)
    errors: list[float] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            with launch.never_left_out():
                got, right = trial()
            errors.extend(((a.cpu() - b).norm() / b.norm()).item() for a, b in zip(got, right, strict=True))
        except Exception as failure:
            failures.append(failure)

    alone = threading.Thread(target=run, name="sw_transplant self-test")
    alone.start()
    alone.join()
    problem = ""
    if failures:
        problem = f"fails on {device}: {type(failures[0]).__name__}: {' '.join(str(failures[0]).split())[:200]}"
    elif not all(error <= TF32_ERROR for error in errors):  # so for NaN
        problem = f"is wrong on {device}: relative errors {', '.join(f'{e:.2g}' for e in errors)}"
    if not problem:
        return ""
    passing = bool(failures) and is_passing(failures[0])
    remedy = "this is tried again at the next call." if passing else "Please report this."
    warnings.warn(
        f"sw_transplant: {what} {problem}; plain PyTorch is used instead. {remedy}", RuntimeWarning, stacklevel=4
    )
    if passing:
        raise Passing(problem)
    return problem
