"""What the Toeplitz kernels are asked by the assembler, the forward and the weight gradient alike."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from sw_transplant.cuda.intrinsics import SIMULATOR
from sw_transplant.cuda.sources import KernelSource
from tests.cuda.assembler import PTXAS, assembles, check_assembled
from tests.cuda.toeplitz_cases import MATHS, Layer

NEEDS = [
    pytest.mark.skipif(PTXAS is None, reason="needs ptxas: pip install nvidia-cuda-nvcc"),
    pytest.mark.skipif(SIMULATOR, reason="the simulator compiles nothing"),
]
CHANNELS = (0, 124, 249)  # of channels_last maps; 0 for contiguous ones
CAPABILITIES = ((9, 0), (10, 0), (8, 0), (8, 6))


def cases(layers: list[Layer]) -> list[tuple[Layer, str, int]]:
    """Every layer with every math and memory format."""
    return list(product(layers, MATHS, CHANNELS))


def check(plan_of: Callable[[tuple[int, int]], Any], source_of: Callable[[Any], KernelSource], folder: Path) -> None:
    """Assembles the plans that devices have for a layer, each once, for all devices that have it.

    Args:
        plan_of: the plan for a compute capability; None where there is no room for several channels.
        source_of: the kernel of a plan.
        folder: for files.
    """
    found: dict[Any, list[tuple[int, int]]] = {}
    for capability in CAPABILITIES:
        if assembles(capability) and (plan := plan_of(capability)) is not None:
            found.setdefault(plan, []).append(capability)
    for plan, capabilities in found.items():
        used = check_assembled(source_of(plan), capabilities, allowed(plan), folder)
        said = ", ".join(f"sm_{a}{b} {n}" for (a, b), n in zip(capabilities, used, strict=True))
        print(f"registers: {said} of {plan.registers}")


def allowed(plan: Any) -> int:
    """Registers of a thread with which as many thread blocks are resident as with those planned.

    A block of many warps may leave some over, which the compiler then takes. They are given out eight at a time.
    """
    warps = plan.threads // 32
    blocks = 4 * (512 // plan.registers) // warps
    return max(r for r in (plan.registers, *range(96, 255, 8), 255) if 4 * (512 // r) // warps >= blocks)
