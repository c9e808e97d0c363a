"""The sum of a module's large depthwise convolutions over one map, in one pass (form "toeplitz").

    y[b,c,h,w] = bias[c] + x[b,c,h,w] + sum over k, i, j of weights[k][c,0,i,j] * x[b, c, h + i - top_k, w + j - left_k]

Operators `torch.ops.sw_transplant.toeplitz_conv`, and `toeplitz_weight_grad` for the gradients of its kernels: on CUDA
kernels for tensor cores, and PyTorch's own convolutions elsewhere and where those do not apply. The gradient of x is
toeplitz_conv with flipped kernels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sw_transplant.cuda import launch
from sw_transplant.ops.direct import Operator, call, register
from sw_transplant.ops.toeplitz_autograd import grad_of_conv, grad_of_weight_grad, save_conv, save_weight_grad
from sw_transplant.ops.toeplitz_formats import takes
from sw_transplant.ops.toeplitz_reference import (
    dense_format,
    pairs,
    toeplitz_conv_reference,
    toeplitz_weight_grad_reference,
)
from sw_transplant.ops.toeplitz_selftest import is_left_out

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
        x: (B, C, H, W); float32, float16, bfloat16 or float64. The kernel reads contiguous and channels_last maps; of
            any other layout, and of channels_last ones that it has no room for, a contiguous copy is made first.
        weights: kernels (C, 1, kh, kw), dtype and device of x; at least one.
        origins: zeros before the map, (top, left) of each kernel one after the other. "Same" padding of an odd kernel
            is (kh // 2, kw // 2); any integers will do.
        bias: (C,), added to the sum, or None.
        residual: add x, too (an identity branch, exact in every dtype).

    Returns:
        (B, C, H, W), in the memory format that was read, dtype and device of x; under autocast everything is cast
        first, as for `conv2d`.
        Sums are formed in float32 (float64 for float64) and rounded once. float32 on CUDA is multiplied as TF32 where
        `torch.backends.cudnn.conv.fp32_precision` is "tf32" (relative error about 3e-4), otherwise as three TF32
        products (2e-7 for strips of 51 x 5, 3e-7 for 51 x 51). The same inputs give the same bits. A product has zeros
        for taps outside a kernel: infinities and NaN in x may spread over their image and channel.
        Differentiable, any number of times.

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
    if not takes(x, [size for weight in weights for size in weight.shape[2:]], origins):
        x = x.contiguous()
    return call("toeplitz_conv", x, weights, origins, bias, residual)


def toeplitz_weight_grad(x: Tensor, grad: Tensor, sizes: Sequence[int], origins: Sequence[int]) -> list[Tensor]:
    """The gradients of `toeplitz_conv` with respect to its kernels.

    Args:
        x, grad: (B, C, H, W), the map and the gradient of the output; of one dtype and device. As with
            `toeplitz_conv`, contiguous copies are made of what the kernel does not take.
        sizes: taps, (kh, kw) of each kernel one after the other.
        origins: as in `toeplitz_conv`.

    Returns:
        One (C, 1, kh, kw) for each kernel, contiguous, dtype and device of x. The kernel for CUDA forms sums in
        float32, rounds them once, and multiplies float32 as `toeplitz_conv` does; its results depend on nothing but
        the arguments, bit for bit. It applies where `toeplitz_conv` has a kernel, if all taps of a kernel are not
        outside of the map. Differentiable in x and grad.
    """
    if takes(x, sizes, origins, gradient=True):
        grad = grad.contiguous(memory_format=dense_format(x))
    else:
        x, grad = x.contiguous(), grad.contiguous()
    return call("toeplitz_weight_grad", x, grad, sizes, origins)


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
    return x.numel() > 0 and _plan(_dense(x), weights, origins) is not None


def weight_grad_kernel_applies(x: Tensor, sizes: Sequence[int], origins: Sequence[int]) -> bool:
    """Whether `toeplitz_weight_grad` runs its kernel for these arguments, rather than PyTorch's convolutions."""
    x = _dense(x)
    return x.numel() > 0 and _weight_grad_plan(x, x, sizes, origins) is not None


def _plan(x: Tensor, weights: Sequence[Tensor], origins: Sequence[int]) -> Any:
    if not _has_kernels(x, gradient=False):
        return None
    from sw_transplant.cuda.toeplitz import plan_for

    return plan_for(x, [(weight.shape[2], weight.shape[3]) for weight in weights], pairs(origins))


def _weight_grad_plan(x: Tensor, grad: Tensor, sizes: Sequence[int], origins: Sequence[int]) -> Any:
    if not _has_kernels(x, gradient=True):
        return None
    from sw_transplant.cuda.toeplitz import weight_grad_plan_for

    return weight_grad_plan_for(x, grad, pairs(sizes), pairs(origins))


def _dense(x: Tensor) -> Tensor:
    """The map as a kernel takes it: as it is, unless somebody calls an operator itself with other strides."""
    return x.contiguous(memory_format=dense_format(x))


def _has_kernels(x: Tensor, gradient: bool) -> bool:
    """Whether the kernels for maps of this memory format are there, and right."""
    if x.device.type != "cuda" or not launch.is_available(x.device.index):
        return False
    return not is_left_out(x.device, not x.is_contiguous(), gradient)


def _run_conv(
    x: Tensor, weights: Sequence[Tensor], origins: Sequence[int], bias: Tensor | None, residual: bool
) -> Tensor:
    dense = _dense(x)
    plan = _plan(dense, weights, origins)
    if plan is None:
        with torch.autocast(x.device.type, enabled=False):  # the dtype of x is what was asked for
            return toeplitz_conv_reference(x, weights, origins, bias, residual)
    from sw_transplant.cuda.toeplitz import toeplitz_conv_forward

    out = torch.empty_like(dense)
    kernels = [weight.contiguous() for weight in weights]
    toeplitz_conv_forward(dense, kernels, None if bias is None else bias.contiguous(), residual, plan, out)
    return out


def _run_weight_grad(x: Tensor, grad: Tensor, sizes: Sequence[int], origins: Sequence[int]) -> list[Tensor]:
    maps = _dense(x), grad.contiguous(memory_format=dense_format(x))
    plan = _weight_grad_plan(*maps, sizes, origins) if x.numel() else None
    if plan is None:
        with torch.autocast(x.device.type, enabled=False):
            return toeplitz_weight_grad_reference(x, grad, sizes, origins)
    from sw_transplant.cuda.toeplitz import toeplitz_weight_grad

    return toeplitz_weight_grad(*maps, plan)


_toeplitz_conv = torch.library.custom_op(
    "sw_transplant::toeplitz_conv",
    _run_conv,
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, int[] origins, Tensor? bias, bool residual) -> Tensor",
)
_toeplitz_weight_grad = torch.library.custom_op(
    "sw_transplant::toeplitz_weight_grad",
    _run_weight_grad,
    mutates_args=(),
    schema="(Tensor x, Tensor grad, int[] sizes, int[] origins) -> Tensor[]",
)


@_toeplitz_conv.register_fake
def _(x: Tensor, weights: Sequence[Tensor], origins: Sequence[int], bias: Tensor | None, residual: bool) -> Tensor:
    return torch.empty_like(x, memory_format=dense_format(x))


@_toeplitz_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, sizes: Sequence[int], origins: Sequence[int]) -> list[Tensor]:
    return [x.new_empty((x.shape[1], 1, *size)) for size in pairs(sizes)]


_toeplitz_conv.register_autograd(grad_of_conv, setup_context=save_conv)
_toeplitz_weight_grad.register_autograd(grad_of_weight_grad, setup_context=save_weight_grad)
register("toeplitz_conv", Operator(_run_conv, save_conv, grad_of_conv))
register("toeplitz_weight_grad", Operator(_run_weight_grad, save_weight_grad, grad_of_weight_grad))
