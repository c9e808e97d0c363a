"""The shift operator of the paper (section 3): responses of small filters, shifted and summed. A gather, no atomics.

    out[k, b, c, h, w] = sum over p of z[b, c, tile, stride * (h, w) + (y, x)]      (tile, y, x) = placements[k, c, p]

Operators `torch.ops.sw_transplant.shift_add` and `shift_add_backward`: Numba kernels on CUDA, and on the CPU for tables
per channel; plain PyTorch otherwise. All add in the same order and round once, so they agree bit for bit. The map is
linear in z: each operator is the other's gradient.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sw_transplant.cuda import launch
from sw_transplant.ops.shift_add_reference import shift_add_backward_reference, shift_add_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def shift_add(z: Tensor, placements: Tensor, out_size: Sequence[int], stride: Sequence[int] = (1, 1)) -> Tensor:
    """Sum shifted responses of small filters: the exact form 1 of a large depthwise convolution (paper, section 3).

    Args:
        z: (B, C, T, Hz, Wz) responses of T tiles per channel; float32, float16, bfloat16 or float64, any strides.
        placements: int32 (K, G, P, 3) on the device of z: for each of K branches P rows (tile, y, x), shared by all
            channels (G = 1) or one table per channel (G = C). A row whose tile is outside 0 .. T-1 is absent (-1 is
            the usual padding); y and x may be negative or beyond z; a tile may be placed any number of times.
        out_size: (H, W) of the result, both at least 1.
        stride: (sh, sw), steps in z from one output to the next, both at least 1.

    Returns:
        (K, B, C, H, W), contiguous, dtype and device of z (also under autocast):
        `out[k,b,c,h,w] = sum over p of z[b, c, tile, sh*h + y, sw*w + x]`, positions outside z counting as zero.
        The terms are added in the order of p in float32 (float64 for float64) and rounded once: deterministic, the
        same bits from every implementation. Differentiable in z, any number of times.

    Raises:
        ValueError: a shape, dtype, device, size or stride is not as above. What the rows of placements say is not
            looked at (that would wait for the GPU): those that point nowhere add nothing.

    Example:
        >>> z = torch.arange(5.0).reshape(1, 1, 1, 1, 5)
        >>> rows = torch.tensor([[0, 0, 0], [0, 0, 2]], dtype=torch.int32).reshape(1, 1, 2, 3)
        >>> shift_add(z, rows, (1, 4))
        tensor([[[[[2., 4., 6., 3.]]]]])
    """
    _check(z, placements, out_size, stride)
    return torch.ops.sw_transplant.shift_add(z, placements, out_size, stride)


def _check(z: Tensor, placements: Tensor, out_size: Sequence[int], stride: Sequence[int]) -> None:
    if z.dim() != 5:
        raise ValueError(f"shift_add: z has shape {tuple(z.shape)}; expected 5 dimensions (B, C, T, Hz, Wz)")
    if z.dtype not in DTYPES:
        raise ValueError(f"shift_add: z has dtype {z.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    if placements.dim() != 4 or placements.shape[3] != 3:
        raise ValueError(
            f"shift_add: placements has shape {tuple(placements.shape)}; expected (K, G, P, 3), rows (tile, y, x)"
        )
    if placements.dtype != torch.int32:
        raise ValueError(f"shift_add: placements has dtype {placements.dtype}; expected torch.int32, use .int()")
    if placements.device != z.device:
        raise ValueError(
            f"shift_add: placements is on {placements.device}, z on {z.device}; move the table once: .to({z.device})"
        )
    if placements.shape[1] != 1 and placements.shape[1] != z.shape[1]:
        raise ValueError(
            f"shift_add: placements has G = {placements.shape[1]} tables; expected 1 for all channels or one for each "
            f"of the {z.shape[1]} channels of z"
        )
    if len(out_size) != 2 or out_size[0] < 1 or out_size[1] < 1:
        raise ValueError(f"shift_add: out_size is {tuple(out_size)}; expected two sizes (H, W) of at least 1")
    if len(stride) != 2 or stride[0] < 1 or stride[1] < 1:
        raise ValueError(f"shift_add: stride is {tuple(stride)}; expected two steps (sh, sw) of at least 1")


@torch.library.custom_op(
    "sw_transplant::shift_add",
    mutates_args=(),
    schema="(Tensor z, Tensor placements, SymInt[2] out_size, int[2] stride) -> Tensor",
)
def _shift_add(z: Tensor, placements: Tensor, out_size: Sequence[int], stride: Sequence[int]) -> Tensor:
    kernels = _kernels(placements, z.shape[2], z.shape[3:], out_size, stride)
    if kernels is not None:
        out = z.new_empty((placements.shape[0], *z.shape[:2], *out_size))
        kernels.shift_add_forward(z.contiguous(), placements.contiguous(), out, stride)
        return out
    return shift_add_reference(z, placements, out_size, stride)


@torch.library.custom_op(
    "sw_transplant::shift_add_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor placements, SymInt tiles, SymInt[2] z_size, int[2] stride) -> Tensor",
)
def _shift_add_backward(
    grad: Tensor, placements: Tensor, tiles: int, z_size: Sequence[int], stride: Sequence[int]
) -> Tensor:
    kernels = _kernels(placements, tiles, z_size, grad.shape[3:], stride)
    if kernels is not None:
        grad_z = grad.new_empty((*grad.shape[1:3], tiles, *z_size))
        kernels.shift_add_backward(grad.contiguous(), placements.contiguous(), grad_z, stride)
        return grad_z
    return shift_add_backward_reference(grad, placements, tiles, z_size, stride)


def _kernels(
    placements: Tensor, tiles: int, z_size: Sequence[int], out_size: Sequence[int], stride: Sequence[int]
) -> Any:
    """The module of kernels to use, imported when first needed, or None where the reference has to do or is faster."""
    device = placements.device
    if device.type == "cuda" and launch.is_available(device.index):
        from sw_transplant.cuda import shift_add

        return shift_add if shift_add.supports(placements, tiles, z_size, out_size, stride) else None
    if device.type == "cpu" and placements.shape[1] > 1:
        return _cpu_kernels()
    return None


@functools.cache
def _cpu_kernels() -> Any:
    try:
        from sw_transplant.ops import shift_add_cpu
    except ImportError as error:  # also what Numba raises for a NumPy newer than it knows
        warnings.warn(f"shift_add: Numba cannot be imported ({error}); plain PyTorch is used", RuntimeWarning, 2)
        return None
    return shift_add_cpu


@_shift_add.register_fake
def _(z: Tensor, placements: Tensor, out_size: Sequence[int], stride: Sequence[int]) -> Tensor:
    return z.new_empty((placements.shape[0], z.shape[0], z.shape[1], *out_size))


@_shift_add_backward.register_fake
def _(grad: Tensor, placements: Tensor, tiles: int, z_size: Sequence[int], stride: Sequence[int]) -> Tensor:
    return grad.new_empty((grad.shape[1], grad.shape[2], tiles, *z_size))


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, placements, _, stride = inputs
    ctx.save_for_backward(placements)
    ctx.tiles, ctx.z_size, ctx.stride = z.shape[2], z.shape[3:], stride


def _grad_of_forward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (placements,) = ctx.saved_tensors
    grad_z = torch.ops.sw_transplant.shift_add_backward(grad, placements, ctx.tiles, ctx.z_size, ctx.stride)
    return grad_z, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, placements, _, _, stride = inputs
    ctx.save_for_backward(placements)
    ctx.out_size, ctx.stride = grad.shape[3:], stride


def _grad_of_backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor, None, None, None, None]:
    (placements,) = ctx.saved_tensors
    grad = torch.ops.sw_transplant.shift_add(grad_z, placements, ctx.out_size, ctx.stride)
    return grad, None, None, None, None


_shift_add.register_autograd(_grad_of_forward, setup_context=_save_forward)
_shift_add_backward.register_autograd(_grad_of_backward, setup_context=_save_backward)
