"""Launching the weight gradient: the plan for a call, the grid, and the sum over the workspace."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sw_transplant.cuda.launch import launch
from sw_transplant.cuda.sources import Factory
from sw_transplant.cuda.toeplitz.division import Device, choose_turns, device_of
from sw_transplant.cuda.toeplitz.gradient.plan import GradientPlan
from sw_transplant.cuda.toeplitz.gradient.settings import choose_gradient_plan, fixed_turns, resident_blocks
from sw_transplant.cuda.toeplitz.launcher import INT32_MAX, arguments_of_plan
from sw_transplant.cuda.toeplitz.plan import Size

GRADIENT = Factory("sw_transplant.cuda.toeplitz.gradient.kernel", "gradient_source")

MOST_TURNS = 64  # sums of a chunk: few enough that truncation in the hardware stays below the error of the operands


class GradientGrid(NamedTuple):
    """How a call is divided over thread blocks.

    A block takes `turns` groups of `plan.items` tiles of `plan.channels` channels, one after the other: so many that
    the device is done soonest, and no more than MOST_TURNS. The workspace has a float32 of every tap for each chunk:
    with many channels there are few chunks, and with few channels few taps.
    """

    tiles: Size  # down and across the map
    items: int  # tiles of all images
    turns: int
    chunks: int
    blocks: int


def divide_gradient(plan: GradientPlan, batch: int, channels: int, size: Size, device: Device) -> GradientGrid:
    """The grid for a batch; channels of one chunk are neighbours, and the shares of a channel, which read the same."""
    down, across = (-(-s // t) for s, t in zip(size, plan.tile, strict=True))
    items, each = batch * down * across, -(-channels // plan.channels) * plan.shares
    groups, slots = -(-items // plan.items), device.multiprocessors * resident_blocks(plan, device)
    turns = choose_turns(groups, each, slots, fixed_turns(plan), MOST_TURNS)
    chunks = -(-groups // turns)
    return GradientGrid((down, across), items, turns, chunks, chunks * each)


def weight_grad_plan_for(
    x: Tensor, grad: Tensor, sizes: Sequence[Size], origins: Sequence[Size]
) -> GradientPlan | None:
    """The plan for a map and a gradient (B, C, H, W) on a CUDA device, both contiguous or both channels_last, or None
    where the kernel does not apply."""
    arguments = arguments_of_plan([x, grad], sizes, origins)
    plan = None if arguments is None else choose_gradient_plan(*arguments)
    if plan is None:
        return None
    grid = divide_gradient(plan, x.shape[0], x.shape[1], (x.shape[2], x.shape[3]), device_of(x.device.index))
    if max(grid.blocks, grid.items + grid.turns * plan.items) > INT32_MAX:
        return None
    return plan


def toeplitz_weight_grad(x: Tensor, grad: Tensor, plan: GradientPlan) -> list[Tensor]:
    """The gradient (C, 1, kh, kw) of every kernel; x and grad (B, C, H, W) are those that the plan was chosen for, not
    empty."""
    batch, channels, height, width = x.shape
    grid = divide_gradient(plan, batch, channels, (height, width), device_of(x.device.index))
    workspace = torch.empty(grid.chunks, channels * plan.taps, dtype=torch.float32, device=x.device)
    arguments = [x, grad, workspace, grid.items, channels, height, width, *grid.tiles, grid.turns]
    launch(GRADIENT, (plan,), grid.blocks, plan.threads, arguments, 4 * plan.shared_words)
    return gradients_from(workspace, plan, channels, x.dtype)


def gradients_from(workspace: Tensor, plan: GradientPlan, channels: int, dtype: torch.dtype) -> list[Tensor]:
    """Add up the chunks, in a fixed order, and round once."""
    lengths = [channels * kernel.size[0] * kernel.size[1] for kernel in plan.kernels]
    return [
        part.sum(0).to(dtype).view(channels, 1, *kernel.size)
        for part, kernel in zip(workspace.split(lengths, dim=1), plan.kernels, strict=True)
    ]
