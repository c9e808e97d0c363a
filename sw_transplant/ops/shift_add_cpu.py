# mypy: disallow-untyped-defs=False
"""Shift-and-add on the CPU for a table per channel: one pass over z for each placement, row by row, with Numba.

Against the reference, which has to gather, on one thread (float32, the four stages of SLaK-T, four edges per channel):
4 to 12 times as fast forward, 8 to 27 times backward. For one table that all channels share the reference adds whole
slices instead, and is 1.3 to 3 times as fast forward, about as fast backward: the operator leaves those to it.

The planes of a batch are divided over as many plain threads as PyTorch uses. Numba's own parallel loops would do the
same, but its threading layers abort the process on concurrent calls or after a fork, as in a data loader's worker.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch
from torch import Tensor

from sw_transplant.ops.shift_add_reference import accumulation_dtype

WORK_OF_A_THREAD = 2**18  # additions below which starting one more thread does not pay


def shift_add_forward(z: Tensor, placements: Tensor, out: Tensor, stride: Sequence[int]) -> None:
    """Fill out (K, B, C, H, W) from z (B, C, T, Hz, Wz); both contiguous and of one dtype."""
    branches, batch, channels, height, width = out.shape
    sums = _zeros(out)
    work = out.numel() * placements.shape[2]
    wide = z.to(sums.dtype).view(batch * channels, *z.shape[2:])
    _divide(_forward, wide, placements, sums.view(branches, batch * channels, height, width), stride, work)
    out.copy_(sums)  # rounds, or does nothing


def shift_add_backward(grad: Tensor, placements: Tensor, grad_z: Tensor, stride: Sequence[int]) -> None:
    """Fill grad_z (B, C, T, Hz, Wz) from grad (K, B, C, H, W); both contiguous and of one dtype."""
    branches, batch, channels, height, width = grad.shape
    sums = _zeros(grad_z)
    work = grad.numel() * placements.shape[2]
    wide = grad.to(sums.dtype).view(branches, batch * channels, height, width)
    _divide(_backward, sums.view(batch * channels, *grad_z.shape[2:]), placements, wide, stride, work)
    grad_z.copy_(sums)  # rounds, or does nothing


def _zeros(result: Tensor) -> Tensor:
    """Where to form the sums: in the result itself, if it has their dtype."""
    dtype = accumulation_dtype(result.dtype)
    return result.zero_() if result.dtype == dtype else torch.zeros_like(result, dtype=dtype)


def _divide(kernel: Callable, z: Tensor, placements: Tensor, out: Tensor, stride: Sequence[int], work: int) -> None:
    """Run the kernel on z (B * C, T, Hz, Wz) and out (K, B * C, H, W), the planes divided over threads."""
    planes = z.shape[0]
    threads = max(1, min(torch.get_num_threads(), planes, work // WORK_OF_A_THREAD))
    bounds = [planes * i // threads for i in range(threads + 1)]
    arguments = (z.detach().numpy(), placements.numpy(), out.detach().numpy(), *stride)
    if threads == 1:
        kernel(*arguments, 0, planes)
        return
    with ThreadPoolExecutor(threads) as pool:  # a pool for each call: threads do not survive a fork
        list(pool.map(lambda i: kernel(*arguments, bounds[i], bounds[i + 1]), range(threads)))


def _compile(function: Callable) -> Any:
    """Compiled on the first call, without the interpreter's lock; kept on disk where there is a place to write."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder that Numba may write to
        return numba.njit(nogil=True)(function)


@_compile
def _overlap(size, z_size, shift, stride):
    """The outputs first .. last - 1 that read inside z."""
    return max(0, -(shift // stride)), min(size, (z_size - 1 - shift) // stride + 1)


@_compile
def _forward(z, placements, out, stride_h, stride_w, first_plane, last_plane):
    branches, channels, rows, _ = placements.shape
    tiles, z_height, z_width = z.shape[1:]
    height, width = out.shape[2:]
    for k in range(branches):
        for plane in range(first_plane, last_plane):
            for p in range(rows):
                tile, y, x = placements[k, plane % channels, p]
                if tile < 0 or tile >= tiles:
                    continue
                top, bottom = _overlap(height, z_height, y, stride_h)
                left, right = _overlap(width, z_width, x, stride_w)
                for h in range(top, bottom):
                    source, target = z[plane, tile, stride_h * h + y], out[k, plane, h]
                    if stride_w == 1:  # known to be 1, it becomes vector instructions
                        for w in range(left, right):
                            target[w] += source[w + x]
                    else:
                        for w in range(left, right):
                            target[w] += source[stride_w * w + x]


@_compile
def _backward(z, placements, out, stride_h, stride_w, first_plane, last_plane):
    branches, channels, rows, _ = placements.shape
    tiles, z_height, z_width = z.shape[1:]
    height, width = out.shape[2:]
    for plane in range(first_plane, last_plane):
        for k in range(branches):
            for p in range(rows):
                tile, y, x = placements[k, plane % channels, p]
                if tile < 0 or tile >= tiles:
                    continue
                top, bottom = _overlap(height, z_height, y, stride_h)
                left, right = _overlap(width, z_width, x, stride_w)
                for h in range(top, bottom):
                    source, target = out[k, plane, h], z[plane, tile, stride_h * h + y]
                    if stride_w == 1:  # known to be 1, it becomes vector instructions
                        for w in range(left, right):
                            target[w + x] += source[w]
                    else:
                        for w in range(left, right):
                            target[stride_w * w + x] += source[w]
