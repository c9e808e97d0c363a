"""Launching Toeplitz kernels: the plan for a call, and the grid."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sw_transplant.cuda.launch import launch
from sw_transplant.cuda.sources import Factory
from sw_transplant.cuda.toeplitz.division import Device, choose_turns, device_of
from sw_transplant.cuda.toeplitz.plan import MAX_KERNELS, MAX_REACH, Plan, Size, widest_vector
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
    """The grid for a batch; tiles of one channel and image group are neighbours, to share their halos in the cache, and
    so are the channels of a channels_last map."""
    down, across = (-(-s // t) for s, t in zip(size, plan.step_out, strict=True))
    groups = -(-batch // (plan.planes // plan.channels))
    each = -(-channels // plan.channels) * down * across
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
    """The plan for a map (B, C, H, W) on a CUDA device, contiguous or channels_last, or None where the kernel does not
    apply."""
    arguments = arguments_of_plan([x], sizes, origins)
    plan = None if arguments is None else choose_plan(*arguments)
    if plan is None:
        return None
    grid = divide(plan, x.shape[0], x.shape[1], (x.shape[2], x.shape[3]), device_of(x.device.index))
    if grid.blocks > INT32_MAX:
        return None
    return plan


class Arguments(NamedTuple):
    """What a plan is chosen by, in the order of `choose_plan` and `choose_gradient_plan`."""

    math: str
    size: Size
    sizes: tuple[Size, ...]
    origins: tuple[Size, ...]
    device: Device
    vector: int
    channels_last: bool


def arguments_of_plan(maps: Sequence[Tensor], sizes: Sequence[Size], origins: Sequence[Size]) -> Arguments | None:
    """What a plan is chosen by, for maps of one shape and memory format on a CUDA device; None where none applies."""
    x = maps[0]
    channels_last = not x.is_contiguous()
    shape = (x.shape[0], x.shape[1], (x.shape[2], x.shape[3]))
    arguments = arguments_for(x.dtype, x.device.index, *shape, sizes, origins, channels_last)
    if arguments is None:
        return None
    vector = arguments.vector
    while any(a.data_ptr() % (vector * a.itemsize) for a in maps):  # a view may begin anywhere
        vector //= 2
    return arguments._replace(vector=vector)


def arguments_for(
    dtype: torch.dtype,
    device: int,
    batch: int,
    channels: int,
    size: Size,
    sizes: Sequence[Size],
    origins: Sequence[Size],
    channels_last: bool,
) -> Arguments | None:
    """The same for maps that begin at a multiple of 16 bytes."""
    math, (height, width) = math_of(dtype), size
    if math is None or not 1 <= len(sizes) <= MAX_KERNELS:
        return None
    if max(height * width * (channels if channels_last else 1), batch) > INT32_MAX - 2**24:
        return None
    if max(abs(value) for pair in (*sizes, *origins) for value in pair) > MAX_REACH:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):  # TF32 and bfloat16 products came with Ampere
        return None
    vector = widest_vector(math, channels if channels_last else width)
    return Arguments(math, size, tuple(sizes), tuple(origins), device_of(device), vector, channels_last)


def toeplitz_conv_forward(
    x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, residual: bool, plan: Plan, out: Tensor
) -> None:
    """Fill out from x (B, C, H, W), weights (C, 1, kh, kw) and bias (C,), of one dtype, on one device.

    All are contiguous, x and out perhaps channels_last; out begins at a multiple of 16 bytes.
    """
    if not out.numel():
        return
    batch, channels, height, width = x.shape
    grid = divide(plan, batch, channels, (height, width), device_of(x.device.index))
    pointers = [weights[min(i, len(weights) - 1)] for i in range(MAX_KERNELS)]
    sizes = (batch, channels, height, width, *grid.tiles, grid.turns)
    arguments = [x, *pointers, x if bias is None else bias, out, *sizes]
    key = (plan, bias is not None, residual)
    launch(FORWARD, key, grid.blocks, plan.threads, arguments, 4 * plan.shared_words)
