"""The sum of a module's large depthwise convolutions over one map, in one pass (form "toeplitz").

    y[b,c,h,w] = bias[c] + x[b,c,h,w] + sum over k, i, j of weights[k][c,0,i,j] * x[b, c, h + i - top_k, w + j - left_k]

Operators `torch.ops.sw_transplant.toeplitz_conv`, and `toeplitz_weight_grad` for the gradients of its kernels: on CUDA
kernels for tensor cores, and PyTorch's own convolutions elsewhere and where those do not apply. The gradient of x is
toeplitz_conv with flipped kernels.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sw_transplant.cuda import launch
from sw_transplant.ops.toeplitz_reference import pairs, toeplitz_conv_reference, toeplitz_weight_grad_reference
from sw_transplant.ops.tracing import constant_when_traced

TF32_ERROR = 2e-3  # relative, of a right result, at most
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def toeplitz_conv(
    x: Tensor,
    weights: Sequence[Tensor],
    origins: Sequence[int],
    bias: Tensor | None = None,
    residual: bool = False,
) -> Tensor:
    """Add up depthwise convolutions of any size, with stride 1 and an output as large as the map.

    Args:
        x: (B, C, H, W); float32, float16, bfloat16 or float64. The kernel reads contiguous maps: of any other layout,
            channels_last too, it makes a contiguous copy first.
        weights: kernels (C, 1, kh, kw), dtype and device of x; at least one.
        origins: zeros before the map, (top, left) of each kernel one after the other. "Same" padding of an odd kernel
            is (kh // 2, kw // 2); any integers will do.
        bias: (C,), added to the sum, or None.
        residual: add x, too (an identity branch, exact in every dtype).

    Returns:
        (B, C, H, W), contiguous, dtype and device of x; under autocast everything is cast first, as for `conv2d`.
        Sums are formed in float32 (float64 for float64) and rounded once. float32 on CUDA is multiplied as TF32 where
        `torch.backends.cudnn.conv.fp32_precision` is "tf32" (relative error about 3e-4), otherwise as three TF32
        products (about 1e-7). The same inputs give the same bits. A product has zeros for taps outside a kernel:
        infinities and NaN in x may spread over their image and channel. Differentiable, any number of times.

    Raises:
        ValueError: a shape, dtype or device is not as above.

    Example:
        >>> x = torch.ones(1, 1, 1, 5)
        >>> toeplitz_conv(x, [torch.ones(1, 1, 1, 3), torch.ones(1, 1, 3, 1)], [0, 1, 1, 0])
        tensor([[[[3., 4., 4., 4., 3.]]]])
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
        bias = None if bias is None else bias.to(dtype)
    _check(x, weights, origins, bias)
    return torch.ops.sw_transplant.toeplitz_conv(x, weights, origins, bias, residual)


def toeplitz_weight_grad(x: Tensor, grad: Tensor, sizes: Sequence[int], origins: Sequence[int]) -> list[Tensor]:
    """The gradients of `toeplitz_conv` with respect to its kernels.

    Args:
        x, grad: (B, C, H, W), the map and the gradient of the output; of one dtype and device. Of a layout other than
            contiguous the kernel makes a copy first.
        sizes: taps, (kh, kw) of each kernel one after the other.
        origins: as in `toeplitz_conv`.

    Returns:
        One (C, 1, kh, kw) for each kernel, contiguous, dtype and device of x. The kernel for CUDA forms sums in
        float32, rounds them once, and multiplies float32 as `toeplitz_conv` does; its results depend on nothing but
        the arguments, bit for bit. It applies where `toeplitz_conv` has a kernel, if all taps of a kernel are not
        outside of the map. Differentiable in x and grad.
    """
    return torch.ops.sw_transplant.toeplitz_weight_grad(x, grad, sizes, origins)


def _check(x: Tensor, weights: Sequence[Tensor], origins: Sequence[int], bias: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"toeplitz_conv: x has shape {tuple(x.shape)}; expected 4 dimensions (B, C, H, W)")
    if x.dtype not in DTYPES:
        raise ValueError(f"toeplitz_conv: x has dtype {x.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    if not weights or len(origins) != 2 * len(weights):
        raise ValueError(
            f"toeplitz_conv: got {len(weights)} kernels and {len(origins)} origins; expected at least one kernel, and "
            "(top, left) for each"
        )
    for i, weight in enumerate(weights):
        if weight.dim() != 4 or weight.shape[0] != x.shape[1] or weight.shape[1] != 1 or 0 in weight.shape[2:]:
            raise ValueError(
                f"toeplitz_conv: weights[{i}] has shape {tuple(weight.shape)}; expected (C, 1, kh, kw) with "
                f"C = {x.shape[1]}, the channels of x"
            )
    if bias is not None and tuple(bias.shape) != (x.shape[1],):
        raise ValueError(f"toeplitz_conv: bias has shape {tuple(bias.shape)}; expected ({x.shape[1]},)")
    for name, tensor in [*((f"weights[{i}]", weight) for i, weight in enumerate(weights)), ("bias", bias)]:
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"toeplitz_conv: {name} is {tensor.dtype} on {tensor.device}; expected {x.dtype} on {x.device}, as x"
            )


def kernel_applies(x: Tensor, weights: Sequence[Tensor], origins: Sequence[int]) -> bool:
    """Whether `toeplitz_conv` runs its kernel for these arguments, rather than PyTorch's convolutions one by one.

    It needs a CUDA device of compute capability 8.0 or more, float32, float16 or bfloat16, at most four kernels, and
    taps that fit into shared memory beside a tile of the map (51 x 5 strips and 31 x 31 squares do).
    """
    return x.numel() > 0 and _plan(x, weights, origins) is not None


def weight_grad_kernel_applies(x: Tensor, sizes: Sequence[int], origins: Sequence[int]) -> bool:
    """Whether `toeplitz_weight_grad` runs its kernel for these arguments, rather than PyTorch's convolutions."""
    return x.numel() > 0 and _weight_grad_plan(x, sizes, origins) is not None


def _plan(x: Tensor, weights: Sequence[Tensor], origins: Sequence[int]) -> Any:
    if not _has_kernels(x):
        return None
    from sw_transplant.cuda.toeplitz import plan_for

    return plan_for(x, [(weight.shape[2], weight.shape[3]) for weight in weights], pairs(origins))


def _weight_grad_plan(x: Tensor, sizes: Sequence[int], origins: Sequence[int]) -> Any:
    if not _has_kernels(x) or _wrong_weight_grad(x.device):
        return None
    from sw_transplant.cuda.toeplitz import weight_grad_plan_for

    return weight_grad_plan_for(x, pairs(sizes), pairs(origins))


def _has_kernels(x: Tensor) -> bool:
    return x.device.type == "cuda" and launch.is_available(x.device.index)


@torch.library.custom_op(
    "sw_transplant::toeplitz_conv",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, int[] origins, Tensor? bias, bool residual) -> Tensor",
)
def _toeplitz_conv(
    x: Tensor, weights: Sequence[Tensor], origins: Sequence[int], bias: Tensor | None, residual: bool
) -> Tensor:
    plan = _plan(x, weights, origins)
    if plan is None:
        with torch.autocast(x.device.type, enabled=False):  # the dtype of x is what was asked for
            return toeplitz_conv_reference(x, weights, origins, bias, residual)
    from sw_transplant.cuda.toeplitz import toeplitz_conv_forward

    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernels = [weight.contiguous() for weight in weights]
    toeplitz_conv_forward(x.contiguous(), kernels, None if bias is None else bias.contiguous(), residual, plan, out)
    return out


@torch.library.custom_op(
    "sw_transplant::toeplitz_weight_grad",
    mutates_args=(),
    schema="(Tensor x, Tensor grad, int[] sizes, int[] origins) -> Tensor[]",
)
def _toeplitz_weight_grad(x: Tensor, grad: Tensor, sizes: Sequence[int], origins: Sequence[int]) -> list[Tensor]:
    plan = _weight_grad_plan(x, sizes, origins) if x.numel() else None
    if plan is None:
        with torch.autocast(x.device.type, enabled=False):
            return toeplitz_weight_grad_reference(x, grad, sizes, origins)
    from sw_transplant.cuda.toeplitz import toeplitz_weight_grad

    return toeplitz_weight_grad(x.contiguous(), grad.contiguous(), plan)


@_toeplitz_conv.register_fake
def _(x: Tensor, weights: Sequence[Tensor], origins: Sequence[int], bias: Tensor | None, residual: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_toeplitz_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, sizes: Sequence[int], origins: Sequence[int]) -> list[Tensor]:
    return [x.new_empty((x.shape[1], 1, *size)) for size in pairs(sizes)]


def _flipped_origins(sizes: Sequence[int], origins: Sequence[int]) -> list[int]:
    return [size - 1 - origin for size, origin in zip(sizes, origins, strict=True)]


def _flipped(weights: Sequence[Tensor]) -> list[Tensor]:
    return [weight.flip(2, 3) for weight in weights]


def _save_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, origins, bias, residual = inputs
    ctx.save_for_backward(x, *weights)
    ctx.origins, ctx.residual, ctx.has_bias = list(origins), residual, bias is not None
    ctx.sizes = [size for weight in weights for size in weight.shape[2:]]


def _grad_of_conv(ctx: Any, grad: Tensor) -> tuple[Tensor | None, list[Tensor | None], None, Tensor | None, None]:
    x, *weights = ctx.saved_tensors
    needs_x, needs_weights, _, needs_bias, _ = ctx.needs_input_grad
    grad_x = grad_bias = None
    grad_weights: list[Tensor | None] = [None] * len(weights)
    if needs_x:
        origins = _flipped_origins(ctx.sizes, ctx.origins)
        grad_x = torch.ops.sw_transplant.toeplitz_conv(grad, _flipped(weights), origins, None, ctx.residual)
    if any(needs_weights):
        grad_weights = torch.ops.sw_transplant.toeplitz_weight_grad(x, grad, ctx.sizes, ctx.origins)
    if ctx.has_bias and needs_bias:
        grad_bias = grad.sum((0, 2, 3))
    return grad_x, grad_weights, None, grad_bias, None


def _save_weight_grad(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, grad, sizes, origins = inputs
    ctx.save_for_backward(x, grad)
    ctx.sizes, ctx.origins = list(sizes), list(origins)


def _grad_of_weight_grad(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor, None, None]:
    """The gradients of the kernels are bilinear in x and grad; their gradients stand in for kernels here."""
    x, grad = ctx.saved_tensors
    origins = _flipped_origins(ctx.sizes, ctx.origins)
    grad_x = torch.ops.sw_transplant.toeplitz_conv(grad, _flipped(grads), origins, None, False)
    return grad_x, torch.ops.sw_transplant.toeplitz_conv(x, list(grads), ctx.origins, None, False), None, None


_toeplitz_conv.register_autograd(_grad_of_conv, setup_context=_save_conv)
_toeplitz_weight_grad.register_autograd(_grad_of_weight_grad, setup_context=_save_weight_grad)


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
    """What is wrong with the results of `toeplitz_conv` on a device, also as a warning; empty if nothing is."""
    x, _, weights, _, origins = _trial()

    def run() -> list[Tensor]:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return [toeplitz_conv(x.to(device), [weight.to(device) for weight in weights], origins)]

    return _problem("toeplitz", device, run, [toeplitz_conv_reference(x, weights, origins)])


@functools.cache
def weight_grad_self_test(device: torch.device) -> str:
    """The same for the kernel of `toeplitz_weight_grad`."""
    from sw_transplant.cuda import toeplitz as kernels

    x, grad, _, sizes, origins = _trial()

    def run() -> list[Tensor]:
        there = x.to(device)
        plan = kernels.weight_grad_plan_for(there, pairs(sizes), pairs(origins))
        return expected if plan is None else kernels.toeplitz_weight_grad(there, grad.to(device), plan)

    expected = toeplitz_weight_grad_reference(x, grad, sizes, origins)
    return _problem("the weight gradient of toeplitz", device, run, expected)


def _wrong_weight_grad(device: torch.device) -> bool:
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
