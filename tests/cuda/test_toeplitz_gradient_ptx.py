"""The weight-gradient kernels through the assembler: no spills, no local memory, the registers as planned."""

from pathlib import Path

import pytest

pytest.importorskip("numba.cuda", reason="the CUDA extra is not installed")

from sw_transplant.cuda.intrinsics import SIMULATOR
from sw_transplant.cuda.toeplitz.gradient.kernel import gradient_source
from tests.cuda.assembler import PTXAS, check_assembled
from tests.cuda.toeplitz_cases import LAYERS, MATHS, Layer, strips

pytestmark = [
    pytest.mark.skipif(PTXAS is None, reason="needs ptxas: pip install nvidia-cuda-nvcc"),
    pytest.mark.skipif(SIMULATOR, reason="the simulator compiles nothing"),
]
QUICK = [
    (LAYERS[0], "tf32", (9, 0)),
    (LAYERS[0], "tf32x3", (8, 0)),
    (LAYERS[6], "bfloat16", (9, 0)),
]
MORE = [
    Layer((56, 56), ((7, 7), (51, 5), (5, 51), (3, 3))),
    Layer((100, 100), ((51, 51),)),
    Layer((40, 88), strips(51, 7)),
    Layer((14, 14), ((5, 5), (5, 5))),
]
ALL = [(layer, math, (9, 0)) for layer in LAYERS + MORE for math in MATHS]
ALL += [(layer, math, capability) for layer in LAYERS + MORE for math in MATHS[:3] for capability in ((8, 0), (8, 6))]


def check(layer: Layer, math: str, capability: tuple[int, int], folder: Path, channels: int = 0) -> None:
    plan = layer.gradient_plan(math, capability, channels)
    if plan is None and channels:
        return  # no room for several channels: contiguous copies are made
    check_assembled(gradient_source(plan), capability, plan.registers, folder)


@pytest.mark.parametrize(("layer", "math", "capability"), QUICK, ids=str)
def test_some_kernels_assemble_without_spills(layer, math, capability, tmp_path) -> None:
    check(layer, math, capability, tmp_path)


def test_channels_last(tmp_path) -> None:
    check(LAYERS[0], "float16", (9, 0), tmp_path, channels=124)


@pytest.mark.exhaustive
@pytest.mark.parametrize("channels", [124, 249])
@pytest.mark.parametrize(("layer", "math", "capability"), ALL, ids=str)
def test_all_channels_last(layer, math, capability, channels: int, tmp_path) -> None:
    check(layer, math, capability, tmp_path, channels=channels)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("layer", "math", "capability"), ALL, ids=str)
def test_all_kernels_assemble_without_spills(layer, math, capability, tmp_path) -> None:
    check(layer, math, capability, tmp_path)
