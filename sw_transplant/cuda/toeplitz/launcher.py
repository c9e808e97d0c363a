"""Launching Toeplitz kernels: the plan for a call, and the grid."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sw_transplant.cuda.launch import launch
from sw_transplant.cuda.sources import Factory
from sw_transplant.cuda.toeplitz.division import Device, choose_turns, device_of
from sw_transplant.cuda.toeplitz.plan import MAX_KERNELS, MAX_REACH, Plan, Size
from sw_transplant.cuda.toeplitz.settings import choose_plan, fixed_turns, resident_blocks

FORWARD = Factory("sw_transplant.cuda.toeplitz.kernel", "toeplitz_source")

INT32_MAX = 2**31 - 1
MOST_TURNS = 64


class Grid(NamedTuple):
    """How a call is divided over thread blocks."""

    tiles: Size  # down and across the map
    turns: int  # groups of images that a block takes one after the other
    blocks: int


def divide(plan: Plan, batch: int, channels: int, size: Size, device: Device) -> Grid:
    """The grid for a batch; tiles of one channel and image group are neighbours, to share their halos in the cache."""
    down, across = (-(-s // t) for s, t in zip(size, plan.step_out, strict=True))
    groups, each = -(-batch // plan.planes), channels * down * across
    slots = device.multiprocessors * resident_blocks(plan, device)
    turns = choose_turns(groups, each, slots, fixed_turns(plan), MOST_TURNS)
    return Grid((down, across), turns, -(-groups // turns) * each)


def math_of(dtype: torch.dtype) -> str | None:
    """How values of this dtype are multiplied; float32 as PyTorch's own convolutions do it at this moment."""
    if dtype == torch.float32:
        precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        return "tf32" if precision == "tf32" else "tf32x3"
    return {torch.float16: "float16", torch.bfloat16: "bfloat16"}.get(dtype)


def plan_for(x: Tensor, sizes: Sequence[Size], origins: Sequence[Size]) -> Plan | None:
    """The plan for a map (B, C, H, W) on a CUDA device, or None where the kernel does not apply."""
    arguments = arguments_of_plan(x, sizes, origins)
    plan = None if arguments is None else choose_plan(*arguments)
    if plan is None:
        return None
    grid = divide(plan, x.shape[0], x.shape[1], (x.shape[2], x.shape[3]), device_of(x.device.index))
    if grid.blocks > INT32_MAX:
        return None
    return plan


def arguments_of_plan(
    x: Tensor, sizes: Sequence[Size], origins: Sequence[Size]
) -> tuple[str, Size, tuple[Size, ...], tuple[Size, ...], Device] | None:
    """What a plan is chosen by, for a map on a CUDA device, or None where no kernel applies."""
    math = math_of(x.dtype)
    height, width = x.shape[2:]
    if math is None or not 1 <= len(sizes) <= MAX_KERNELS or max(height * width, x.shape[0]) > INT32_MAX - 2**24:
        return None
    if max(abs(value) for pair in (*sizes, *origins) for value in pair) > MAX_REACH:
        return None
    if torch.cuda.get_device_capability(x.device) < (8, 0):  # TF32 and bfloat16 products came with Ampere
        return None
    return math, (height, width), tuple(sizes), tuple(origins), device_of(x.device.index)


def toeplitz_conv_forward(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, residual: bool, plan: Plan, out: Tensor
) -> None:
    """Fill out from x (B, C, H, W), weights (C, 1, kh, kw) and bias (C,): contiguous, of one dtype, on one device."""
    if not out.numel():
        return
    batch, channels, height, width = x.shape
    grid = divide(plan, batch, channels, (height, width), device_of(x.device.index))
    pointers = [weights[min(i, len(weights) - 1)] for i in range(MAX_KERNELS)]
    sizes = (batch, channels, height, width, *grid.tiles, grid.turns)
    arguments = [x, x, *pointers, x if bias is None else bias, out, *sizes]
    key = (plan, bias is not None, residual)
    launch(FORWARD, key, grid.blocks, plan.threads, arguments, 4 * plan.shared_words)
