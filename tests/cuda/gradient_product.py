"""The products of the weight gradient for some images, with NumPy in place of the kernel around them."""

import numpy as np
import torch

from sw_transplant.cuda.toeplitz.gradient.plan import ROWS, GradientPlan
from sw_transplant.cuda.toeplitz.gradient.product import multiply, spread
from sw_transplant.cuda.toeplitz.plan import Area, Copy
from tests.cuda.lockstep import LANES, Lockstep


def words_of(values: torch.Tensor, math: str) -> np.ndarray:
    """Values of a row as words of shared memory."""
    if values.dtype == torch.float32:
        bits = values.numpy().view(np.uint32)
        return (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000) if math == "tf32" else bits
    return values.view(torch.int16).numpy().view(np.uint32)


def stage(plane: np.ndarray, image: torch.Tensor, copy: Copy, area: Area, corner, math: str) -> None:
    """An area of a map, value by value as the plan describes it, for the tile that begins at `corner`."""
    values = copy.step[1]
    for row in range(area.row, area.row + area.rows):
        line = torch.zeros(copy.pitch * values, dtype=image.dtype)
        y = corner[0] + row
        for i in range(len(line)):
            x = corner[1] + copy.column + i
            inside = area.column <= copy.column + i < area.column + area.columns
            if inside and 0 <= y < image.shape[0] and 0 <= x < image.shape[1]:
                line[i] = image[y, x]
        begin = copy.first + (row - copy.row) * copy.pitch
        plane[begin : begin + copy.pitch] = words_of(line, math)


def staged_planes(plan: GradientPlan, images: torch.Tensor, grads: torch.Tensor) -> list[np.ndarray]:
    """Shared memory for each tile of each image: the last plane of it, NaN before that."""
    size = images.shape[1:]
    corners = [(t, c) for t in range(0, size[0], plan.tile[0]) for c in range(0, size[1], plan.tile[1])]
    planes = []
    for image, grad in zip(images, grads, strict=True):
        for corner in corners:
            memory = np.full(plan.planes * plan.plane_words, 0xFFFFFFFF, np.uint32)
            plane = memory[(plan.planes - 1) * plan.plane_words :]
            plane[:] = 0
            stage(plane, image, plan.map_copy, plan.map_area, corner, plan.math)
            stage(plane, grad, plan.grad_copy, plan.grad_area, corner, plan.math)
            planes.append(memory)
    return planes


def sum_of_diagonals(memory: np.ndarray, plan: GradientPlan, number: int) -> np.ndarray:
    """The taps of the line whose fragments lie side by side."""
    width = 8 * len(plan.distances[number])
    taps = np.zeros(plan.kernels[number].length, np.float32)
    for row in range(ROWS):
        values = memory[row * plan.scratch_pitch :][:width].view(np.float32)
        for column, value in enumerate(values):
            tap = column - row + plan.first_column(number)
            if 0 <= tap < len(taps):
                taps[tap] += value
    return taps


def gradients(plan: GradientPlan, images: torch.Tensor, grads: torch.Tensor, ops=Lockstep) -> list[np.ndarray]:
    """The gradients of all kernels of one channel for maps (B, H, W), all warps of a plane one after the other."""
    results = [np.zeros(kernel.size, np.float32) for kernel in plan.kernels]
    planes, begin = staged_planes(plan, images, grads), (plan.planes - 1) * plan.plane_words
    for index, group in enumerate(plan.groups):
        kernel, result = plan.kernels[group.kernel], results[group.kernel]
        for part in range(plan.parts):
            sums = [np.zeros(32, np.float32)] * plan.sums
            for memory in planes:
                sums = multiply(ops(memory, plan.math), plan, sums, begin, LANES, index, part)
            for slot in range(group.lines):
                scratch = np.full(ROWS * plan.scratch_pitch, 0xFFFFFFFF, np.uint32)
                spread(ops(scratch, plan.math), plan, sums, 0, LANES, group.kernel * max(plan.lines) + slot)
                taps = sum_of_diagonals(scratch, plan, group.kernel)
                if kernel.axis == 0:
                    result[:, group.first + slot] += taps
                else:
                    result[group.first + slot] += taps
    return results
