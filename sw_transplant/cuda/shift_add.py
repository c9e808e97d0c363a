"""Shift-and-add on the GPU: two gathers, bound by memory bandwidth, no atomics.

Forward: a block owns outputs of one channel, of one or more images, for all branches, so z is read once. Backward: a
block owns positions of z of one channel, for a run of tiles. In both, the placements wait in shared memory as rows of
three words; a thread owns several outputs, whose loads are independent, and neighbouring threads own neighbouring
outputs. Positions inside a block's memory take 32 bits; only the place where that memory begins takes 64.

The sums have the order and the dtype of `shift_add_reference`, hence its bits.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sw_transplant.cuda.launch import launch
from sw_transplant.cuda.sources import Factory

FORWARD = Factory("sw_transplant.cuda.shift_add_kernels", "forward_source")
BACKWARD = Factory("sw_transplant.cuda.shift_add_kernels", "backward_source")

MAX_THREADS = 256
ENOUGH_BLOCKS = 1024  # several for each multiprocessor; blocks are made smaller rather than fewer than that
MAX_ROWS = 2048  # rows of one channel's table, and tiles: together within 48 KB of shared memory
INT32_MAX = 2**31 - 1

# Positions of one thread, that is loads in flight: with the blocks that fit on a multiprocessor they hide the latency
# of memory. More loads where each brings two bytes only.
PER_THREAD = {torch.float32: 4, torch.float64: 4, torch.float16: 8, torch.bfloat16: 8}


class Division(NamedTuple):
    """How the positions (images x plane) of one channel are divided over blocks and threads."""

    images: int  # images of one block
    groups: int  # blocks along the batch
    parts: int  # blocks along the plane: more than one only where a block has one image
    step: int  # threads at work; the positions of one thread lie `step` apart
    threads: int


def divide(batch: int, channels: int, plane: int, per_thread: int, image_size: int) -> Division:
    """Several small planes for a block, or a part of a large one. image_size: elements from one image to the next."""
    capacity = MAX_THREADS * per_thread
    images = max(1, min(capacity // plane, batch * channels // ENOUGH_BLOCKS, INT32_MAX // image_size, batch))
    parts = _ceil_div(images * plane, capacity)
    step = _ceil_div(images * plane, parts * per_thread)  # equal parts, not a full one and a rest
    parts = _ceil_div(images * plane, step * per_thread)
    return Division(images, _ceil_div(batch, images), parts, step, 32 * _ceil_div(step, 32))


def supports(
    placements: Tensor, tiles: int, z_size: Sequence[int], out_size: Sequence[int], stride: Sequence[int]
) -> bool:
    """Whether the kernels can do it: they count a plane's positions in 32 bits and stage a channel's rows at once."""
    (height, width), (stride_h, stride_w) = out_size, stride
    reach = max(tiles * z_size[0] * z_size[1], height * width, height * stride_h, width * stride_w)
    # 2**24: the last block of a plane may count beyond its end
    return reach < INT32_MAX - 2**24 and placements.shape[0] * placements.shape[2] <= MAX_ROWS and tiles <= MAX_ROWS


def shift_add_forward(z: Tensor, placements: Tensor, out: Tensor, stride: Sequence[int]) -> None:
    """Fill out (K, B, C, H, W) from z (B, C, T, Hz, Wz), contiguous and of one dtype, on the current stream."""
    if out.numel():
        plan = forward_plan(z.dtype, z.shape, placements.shape, out.shape, tuple(stride))
        launch(FORWARD, plan.key, plan.grid, plan.threads, [z, placements, out, *plan.sizes], plan.shared_bytes)


def shift_add_backward(grad: Tensor, placements: Tensor, grad_z: Tensor, stride: Sequence[int]) -> None:
    """Fill grad_z (B, C, T, Hz, Wz) from grad (K, B, C, H, W), contiguous and of one dtype, on the current stream."""
    if grad_z.numel():
        plan = backward_plan(grad.dtype, grad_z.shape, placements.shape, grad.shape, tuple(stride))
        arguments = [grad, placements, grad_z, *plan.sizes]
        launch(BACKWARD, plan.key, plan.grid, plan.threads, arguments, plan.shared_bytes)


class Plan(NamedTuple):
    """All that a launch needs beside the tensors."""

    key: tuple
    grid: int
    threads: int
    sizes: tuple[int, ...]
    shared_bytes: int


@functools.lru_cache(maxsize=4096)
def forward_plan(
    dtype: torch.dtype,
    z_shape: tuple[int, ...],
    table_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    stride: tuple,
) -> Plan:
    """The launch of the forward kernel for these shapes."""
    batch, channels, tiles, z_height, z_width = z_shape
    branches, groups, rows, _ = table_shape
    height, width = out_shape[3:]
    z_image, out_image = channels * tiles * z_height * z_width, channels * height * width
    d = divide(batch, channels, height * width, PER_THREAD[dtype], max(z_image, out_image))
    if d.images == 1:
        z_image = out_image = 0  # not used, and perhaps beyond 32 bits
    sizes: tuple[int, ...] = (batch, channels, groups, branches, rows, tiles, z_height, z_width, height, width, *stride)
    sizes += (d.images, d.parts, d.step, z_image, out_image)
    return Plan((dtype,), d.groups * channels * d.parts, d.threads, sizes, 12 * branches * rows)


@functools.lru_cache(maxsize=4096)
def backward_plan(
    dtype: torch.dtype,
    z_shape: tuple[int, ...],
    table_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    stride: tuple,
) -> Plan:
    """The launch of the backward kernel for these shapes."""
    batch, channels, tiles, z_height, z_width = z_shape
    branches, groups, rows, _ = table_shape
    height, width = out_shape[3:]
    z_image, out_image = channels * tiles * z_height * z_width, channels * height * width
    d = divide(batch, channels, z_height * z_width, PER_THREAD[dtype], max(z_image, out_image))
    if d.images == 1:
        z_image = out_image = 0  # not used, and perhaps beyond 32 bits
    blocks = d.groups * channels * d.parts
    run = max(1, tiles // _ceil_div(ENOUGH_BLOCKS, blocks))
    runs = _ceil_div(tiles, run)
    sizes: tuple[int, ...] = (batch, channels, groups, branches, rows, tiles, z_height, z_width, height, width)
    sizes += (d.images, d.parts, d.step, z_image, out_image, run, runs)
    return Plan((dtype, *stride), blocks * runs, d.threads, sizes, 16 * branches * rows + 4 * (run + 1))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
