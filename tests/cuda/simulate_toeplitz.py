"""Run the body of the Toeplitz kernel in Numba's CUDA simulator, against convolutions in float64.

A command of its own, because the simulator is chosen when Numba is imported: NUMBA_ENABLE_CUDASIM=1 python <this file>.
The 32 threads of a warp meet before the products, one of them runs `multiply` for all lanes in lockstep, and they meet
again. Prints one line for each run and exits with an error at the first difference.
"""

from dataclasses import dataclass, replace

import torch
from numba import cuda

from sw_transplant.cuda.toeplitz import launcher
from sw_transplant.cuda.toeplitz.kernel import toeplitz_source
from sw_transplant.cuda.toeplitz.launcher import divide
from sw_transplant.cuda.toeplitz.plan import Plan, widest_vector
from sw_transplant.cuda.toeplitz.product import multiply, spread
from sw_transplant.cuda.toeplitz.settings import choose_plan
from sw_transplant.cuda.toeplitz.staging import DTYPES
from sw_transplant.ops.toeplitz_reference import toeplitz_conv_reference
from tests.cuda.lockstep import Lockstep
from tests.cuda.simulation import Warps, bits, main, memory, vector
from tests.cuda.toeplitz_cases import DEVICES, Tiles

BOUNDS = {"tf32": 1e-3, "tf32x3": 1e-6, "float16": 1e-3, "bfloat16": 5e-3}


def simulated_products(plan: Plan):
    """In place of `emit.device_products`."""
    warps = Warps()

    def products(shared, plane, taps, lane, part):
        def run(slots):
            ops = Lockstep(memory(shared), plan.math)
            return multiply(ops, plan, *(vector(slots, i) for i in range(4)))

        return warps.run(run, int(lane), (plane, taps, lane, part))

    def spread_sums(shared, sums, plane, lane, part):
        def run(slots):
            spread(Lockstep(memory(shared), plan.math), plan, sums, *(vector(slots, i) for i in range(3)))

        warps.run(run, int(lane), (plane, lane, part))

    return products, spread_sums


def run(plan, x, weights, bias, residual) -> torch.Tensor:
    out = bits(torch.full_like(x, float("nan")))
    source = toeplitz_source(plan, bias is not None, residual, simulated_products(plan))
    launcher.choose_turns = lambda groups, *_: min(groups, 2)
    grid = divide(plan, x.shape[0], x.shape[1], tuple(x.shape[2:]), DEVICES[9, 0])
    pointers = [bits(weights[min(i, len(weights) - 1)]) for i in range(4)]
    sizes = (*x.shape, *grid.tiles, grid.turns)
    kernel = cuda.jit(source.function)
    kernel[grid.blocks, plan.threads, 0, 4 * plan.shared_words](
        bits(x), *pointers, bits(x if bias is None else bias), out, *sizes
    )
    values = torch.from_numpy(out if x.dtype == torch.float32 else out.view("int16")).view(x.dtype)
    return values.as_strided(x.shape, x.stride())


Origins = list[tuple[int, int]]


@dataclass(frozen=True)
class Case:
    """One call; origins default to the centres, and the division of the map is the chosen one."""

    name: str
    size: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]
    maths: tuple[str, ...] = ("tf32", "tf32x3", "float16", "bfloat16")
    batch: int = 1
    channels: int = 1
    origins: tuple[tuple[int, int], ...] = ()
    bias: bool = False
    residual: bool = False
    tiles: Tiles | None = None
    square_axis: int | None = None  # contracts all kernels along this axis
    planes: tuple[int, int] | None = None  # of a thread block, and rounds, for channels_last maps

    def padding(self):
        return self.origins or tuple((kh // 2, kw // 2) for kh, kw in self.sizes)

    def plan(self, math: str) -> Plan:
        plan = choose_plan(math, self.size, self.sizes, self.padding(), DEVICES[9, 0])
        if self.planes is not None:
            planes, rounds = self.planes
            vector = min(planes, widest_vector(math, self.channels))
            plan = replace(plan, channels_last=True, planes=planes, rounds=rounds, vector=vector)
        if self.square_axis is not None:
            plan = replace(plan, kernels=tuple(replace(kernel, axis=self.square_axis) for kernel in plan.kernels))
        return plan if self.tiles is None else self.tiles.applied(plan, self.size)


STRIPS = ((51, 5), (5, 51), (5, 5))
CASES = [
    Case("strips, map smaller than the kernel", (13, 14), STRIPS, batch=3, channels=2, bias=True, residual=True),
    Case("strips, odd sizes", (33, 19), STRIPS, batch=1),
    Case("strips, one warp for 64 rows", (56, 24), ((51, 5), (5, 51)), ("tf32", "float16"), batch=2, residual=True),
    Case("strips, three warps", (41, 13), ((31, 3), (3, 9)), batch=2, tiles=Tiles(1, 3, 2, whole=True)),
    Case("tiles with a halo", (37, 35), ((21, 3), (3, 21), (3, 3)), bias=True, tiles=Tiles(1, 2, 2)),
    Case(
        "tiles with a halo, two blocks",
        (50, 21),
        ((9, 5), (5, 9)),
        ("tf32", "float16"),
        tiles=Tiles(2, 1, 1),
        residual=True,
    ),
    Case("13 x 13", (14, 17), ((13, 13),), batch=3, bias=True),
    Case("13 x 13 by rows", (14, 17), ((13, 13),), tiles=Tiles(1, 2, 2), square_axis=0),
    Case("7 x 7", (9, 23), ((7, 7),), batch=3, channels=2),
    Case("even and asymmetric", (15, 11), ((8, 4), (4, 6), (2, 2)), origins=((1, 3), (3, 0), (0, 2)), batch=2),
    Case("padding before a row only", (9, 12), ((8, 4),), origins=((3, 3),), batch=2),
    Case("outside the map", (9, 9), ((3, 5), (5, 3)), ("tf32", "bfloat16"), origins=((-2, 6), (7, -1))),
    Case("a point", (5, 7), ((1, 1),), bias=True),
    Case(
        "channels last, strips, channels beside the last",
        (13, 14),
        ((9, 3), (3, 9)),
        channels=12,
        planes=(8, 2),
        batch=2,
        bias=True,
        residual=True,
    ),
    Case("channels last, one at a time", (9, 23), ((7, 7),), channels=3, planes=(2, 1), batch=3, bias=True),
    Case("channels last, a halo", (20, 21), ((7, 3), (3, 7)), channels=4, planes=(4, 4), tiles=Tiles(1, 1, 2)),
    Case("one pixel", (1, 1), ((5, 3), (3, 5), (3, 3), (1, 1)), ("tf32", "float16"), batch=5, residual=True),
]


def check(case: Case, math: str) -> float:
    """One launch from NaN in memory; returns the relative error."""
    generator = torch.Generator().manual_seed(len(case.name))
    dtype = DTYPES[math]
    x = torch.randn(case.batch, case.channels, *case.size, generator=generator).to(dtype)
    if case.planes is not None:
        x = x.contiguous(memory_format=torch.channels_last)
    weights = [(torch.randn(case.channels, 1, *size, generator=generator) / 8).to(dtype) for size in case.sizes]
    bias = torch.randn(case.channels, generator=generator).to(dtype) if case.bias else None
    plan = case.plan(math)
    out = run(plan, x, weights, bias, case.residual)
    expected = toeplitz_conv_reference(
        x.double(), [w.double() for w in weights], [o for pair in case.padding() for o in pair],
        None if bias is None else bias.double(), case.residual,
    )  # fmt: skip
    error = float((out.double() - expected).norm() / expected.norm())
    shape = f"{plan.planes} planes of {plan.parts} x {plan.blocks} x {plan.columns}, from {plan.origins}"
    print(
        f"{case.name}, {math}: {shape}, axes {[k.axis for k in plan.kernels]}: relative error {error:.1e}", flush=True
    )
    assert error <= BOUNDS[math], (error, out[0, 0], expected[0, 0])
    return error


if __name__ == "__main__":
    main(CASES, check)
