"""Run the bodies of the shift_add kernels in Numba's CUDA simulator, against the reference, bit for bit.

A command of its own, because the simulator is chosen when Numba is imported: NUMBA_ENABLE_CUDASIM=1 python <this file>.
Prints one line for each run and exits with an error at the first difference; with --all there are more runs.
"""

import sys

import numpy as np
import torch
from numba import cuda

from sw_transplant.cuda import intrinsics, shift_add, shift_add_kernels
from sw_transplant.ops import shift_add_backward_reference, shift_add_reference
from tests.ops.shift_add_cases import CASES, Case, assert_same_bits

# Threads at work and the least number of blocks: whole planes, several images to a block; planes in parts, one image
# and one tile to a block; the same with two tiles to a block, and the last of five tiles alone.
DIVISIONS = {"several images": (64, 1), "parts": (4, 1024), "parts and uneven runs": (4, 48)}
RUNS = [
    ("per channel", torch.float64, "several images"),
    ("map smaller than the kernel", torch.bfloat16, "several images"),
    ("map smaller than the kernel", torch.float32, "parts and uneven runs"),
    ("stride 3 and 1, per channel", torch.float16, "parts"),
]
MORE_RUNS = [
    ("plain", torch.float16, "several images"),
    ("stride 2", torch.float32, "several images"),
    ("one row", torch.float32, "several images"),
    ("plain", torch.float32, "parts"),
    ("odd sizes, one image", torch.float32, "parts"),
    ("per channel", torch.float32, "parts"),
    ("stride 2", torch.bfloat16, "parts"),
]


def memory(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as a kernel sees it: flat, bfloat16 as uint16."""
    flat = tensor.flatten()
    return flat.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else flat.numpy()


def fill(source, plan, first: torch.Tensor, placements: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Launch a kernel that fills a tensor like result, from NaN."""
    filled = torch.full_like(result, float("nan"))
    kernel = cuda.jit(source.function)
    kernel[plan.grid, plan.threads, 0, plan.shared_bytes](
        memory(first), memory(placements), memory(filled), *plan.sizes
    )
    return filled


def check(case: Case, dtype: torch.dtype, division: str) -> None:
    """Forward and backward of one case."""
    shift_add.MAX_THREADS, shift_add.ENOUGH_BLOCKS = DIVISIONS[division]
    z, placements, grad = case.inputs(dtype)
    shapes = (dtype, z.shape, placements.shape, grad.shape, case.stride)

    plan = shift_add.forward_plan.__wrapped__(*shapes)
    expected = shift_add_reference(z, placements, case.out_size, case.stride)
    assert_same_bits(fill(shift_add_kernels.forward_source(*plan.key), plan, z, placements, expected), expected)
    print(f"forward: {case}, {dtype}, {division}: {plan.grid} blocks of {plan.threads} threads", flush=True)

    plan = shift_add.backward_plan.__wrapped__(*shapes)
    run, runs = plan.sizes[-2:]
    expected = shift_add_backward_reference(grad, placements, case.tiles, case.z_size, case.stride)
    assert_same_bits(fill(shift_add_kernels.backward_source(*plan.key), plan, grad, placements, expected), expected)
    print(f"backward: {case}, {dtype}, {division}: {plan.grid} blocks, {runs} runs of {run} tiles", flush=True)


def check_bfloat16() -> None:
    """The conversions, on every bfloat16, its neighbours and halfway points in float32, against PyTorch's."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    wide = np.array([intrinsics.widen_bfloat16(bits) for bits in memory(every)], np.float32)
    assert_same_bits(torch.from_numpy(wide), every.float())
    low_bits = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    values = (every.float().view(torch.int32)[::16, None] | low_bits).flatten().view(torch.float32)
    values = torch.cat([values, torch.tensor([3.4028235e38, -3.4028235e38, float("inf"), float("nan")])])
    rounded = np.array([intrinsics.round_to_bfloat16(value) for value in values.numpy()], np.uint16)
    actual, expected = torch.from_numpy(rounded.view(np.int16)).view(torch.bfloat16), values.bfloat16()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_same_bits(actual[~expected.isnan()], expected[~expected.isnan()])
    print(f"bfloat16: {len(every)} widened, {len(values)} rounded", flush=True)


if __name__ == "__main__":
    assert intrinsics.SIMULATOR
    check_bfloat16()
    by_name = {case.name: case for case in CASES}
    for name, dtype, division in RUNS + MORE_RUNS if "--all" in sys.argv else RUNS:
        check(by_name[name], dtype, division)
