"""Run the body of the weight-gradient kernel in Numba's CUDA simulator, against PyTorch's gradients in float64.

A command of its own, because the simulator is chosen when Numba is imported: NUMBA_ENABLE_CUDASIM=1 python <this file>.
The 32 threads of a warp meet before the products, one of them runs `multiply` for all lanes in lockstep, and they meet
again. Prints one line for each run and exits with an error at the first difference.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numba import cuda

from sw_transplant.cuda.toeplitz.gradient import launcher
from sw_transplant.cuda.toeplitz.gradient.kernel import gradient_source
from sw_transplant.cuda.toeplitz.gradient.launcher import divide_gradient, gradients_from
from sw_transplant.cuda.toeplitz.gradient.plan import GradientPlan
from sw_transplant.cuda.toeplitz.gradient.product import multiply, spread
from sw_transplant.cuda.toeplitz.gradient.settings import choose_gradient_plan
from sw_transplant.cuda.toeplitz.plan import widest_vector
from sw_transplant.cuda.toeplitz.staging import DTYPES
from tests.cuda.gradient_error import gradient_error
from tests.cuda.lockstep import Lockstep
from tests.cuda.simulation import Warps, bits, main, memory, vector
from tests.cuda.toeplitz_cases import DEVICES

BOUNDS = {"tf32": 1e-3, "tf32x3": 1e-6, "float16": 1e-3, "bfloat16": 5e-3}
MATHS = tuple(BOUNDS)
Sizes = tuple[tuple[int, int], ...]


def simulated_gradients(plan: GradientPlan):
    """In place of `emit.device_gradients`."""
    warps = Warps()

    def no_sums(shared):
        return [np.zeros(32, np.float32)] * plan.sums

    def add_products(shared, sums, plane, lane, group, part):
        def run(slots):
            ops = Lockstep(memory(shared), plan.math)
            return multiply(ops, plan, sums, *(vector(slots, i) for i in range(4)))

        return warps.run(run, int(lane), (plane, lane, group, part))

    def spread_sums(shared, sums, scratch, lane, which):
        def run(slots):
            spread(Lockstep(memory(shared), plan.math), plan, sums, *(vector(slots, i) for i in range(3)))

        warps.run(run, int(lane), (scratch, lane, which))

    return no_sums, add_products, spread_sums


@dataclass(frozen=True)
class Case:
    """One call; origins default to the centres."""

    name: str
    size: tuple[int, int]
    sizes: Sizes
    maths: tuple[str, ...] = MATHS
    batch: int = 1
    channels: int = 1
    origins: Sizes = ()
    turns: int = 64  # of a thread block, at most
    planes: int = 0  # of a thread block, for channels_last maps
    division: dict[str, Any] = field(default_factory=dict)  # of the work, where it is not the chosen one
    square_axis: int | None = None  # the axis that all lines lie along

    def padding(self) -> Sizes:
        return self.origins or tuple((kh // 2, kw // 2) for kh, kw in self.sizes)

    def plan(self, math: str) -> GradientPlan:
        plan = choose_gradient_plan(math, self.size, self.sizes, self.padding(), DEVICES[9, 0])
        assert plan is not None
        if self.square_axis is not None:
            plan = replace(plan, kernels=tuple(replace(kernel, axis=self.square_axis) for kernel in plan.kernels))
        if self.planes:
            vector = min(self.planes, widest_vector(math, self.channels))
            plan = replace(plan, channels_last=True, planes=self.planes, vector=vector)
        return replace(plan, **self.division)


def cut(rows: int, columns: int) -> dict[str, Any]:
    return {"whole": (None, None), "tile": (rows, columns)}


FEW, OTHERS = ("tf32", "float16"), ("tf32x3", "bfloat16")
CASES = [
    Case("strips, map smaller than the kernel", (13, 14), ((51, 5), (5, 51), (5, 5)), OTHERS, batch=2),
    Case("strips, odd sizes, several chunks", (33, 19), ((21, 3), (3, 21)), batch=3, turns=2),
    Case(
        "planes, parts, shares, a warp without lines",
        (18, 17),
        ((5, 2), (2, 5)),
        ("tf32",),
        batch=3,
        division={"lines": (1, 2), "together": 2, "planes": 2, "parts": 2},
    ),
    Case(
        "tiles with a halo",
        (20, 35),
        ((9, 3), (3, 9), (3, 3)),
        OTHERS,
        turns=2,
        division={"lines": (3, 3, 3), "together": 3, **cut(16, 32)},
    ),
    Case(
        "whole rows, columns with a halo",
        (12, 50),
        ((7, 3), (3, 7)),
        FEW,
        turns=2,
        division={"whole": (12, None), "tile": (12, 16), "planes": 2},
    ),
    Case("13 x 13, lines along the rows", (14, 17), ((13, 13),), ("tf32", "bfloat16"), square_axis=1),
    Case("13 x 13, lines along the columns", (14, 17), ((13, 13),), ("tf32x3", "float16"), square_axis=0),
    Case("7 x 7, some channels", (9, 23), ((7, 7),), ("tf32", "bfloat16"), batch=2, channels=2, turns=2),
    Case("even and asymmetric", (15, 11), ((8, 4), (4, 6), (2, 2)), FEW, origins=((1, 3), (3, 0), (0, 2))),
    Case("beside the map", (9, 9), ((3, 5), (5, 3)), FEW, origins=((-2, 6), (7, -1)), channels=2),
    Case("channels last, strips", (13, 14), ((9, 3), (3, 9)), batch=3, channels=6, planes=4, turns=2),
    Case("channels last, tiles", (10, 19), ((5, 5),), FEW, channels=3, planes=2, turns=2, division=cut(8, 16)),
    Case("four kernels on a pixel", (1, 1), ((5, 3), (3, 5), (3, 3), (1, 1)), FEW, batch=5, turns=2),
]


def check(case: Case, math: str) -> float:
    """One launch, its workspace full of NaN; returns the greatest relative error of a kernel's gradient."""
    generator = torch.Generator().manual_seed(len(case.name))
    shape, dtype, plan = (case.batch, case.channels, *case.size), DTYPES[math], case.plan(math)
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    if case.planes:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    launcher.choose_turns = lambda groups, *_: min(groups, case.turns)
    grid = divide_gradient(plan, case.batch, case.channels, case.size, DEVICES[9, 0])
    workspace = torch.full((grid.chunks, case.channels * plan.taps), float("nan"))
    kernel = cuda.jit(gradient_source(plan, simulated_gradients(plan)).function)
    arguments = (bits(x), bits(grad), workspace.flatten().numpy(), grid.items, *shape[1:], *grid.tiles, grid.turns)
    kernel[grid.blocks, plan.threads, 0, 4 * plan.shared_words](*arguments)
    results = gradients_from(workspace, plan, case.channels, dtype)
    error = gradient_error(results, x, grad, case.sizes, [o for pair in case.padding() for o in pair])
    print(
        f"{case.name}, {math}: {plan.shares} x {plan.together} x {plan.planes} x {plan.parts} warps, "
        f"{grid.turns} turns, {grid.chunks} chunks, axes {[k.axis for k in plan.kernels]}: relative error {error:.1e}",
        flush=True,
    )
    assert error <= BOUNDS[math], (error, results)
    return error


if __name__ == "__main__":
    main(CASES, check)
