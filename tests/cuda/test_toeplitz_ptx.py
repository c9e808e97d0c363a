"""The Toeplitz kernels through the assembler, without a GPU: no spills, no local memory, the registers as planned."""

from pathlib import Path

import pytest

pytest.importorskip("numba.cuda", reason="the CUDA extra is not installed")

from sw_transplant.cuda.intrinsics import SIMULATOR
from sw_transplant.cuda.toeplitz.kernel import toeplitz_source
from tests.cuda.assembler import PTXAS, check_assembled
from tests.cuda.toeplitz_cases import LAYERS, MATHS, Layer

pytestmark = [
    pytest.mark.skipif(PTXAS is None, reason="needs ptxas: pip install nvidia-cuda-nvcc"),
    pytest.mark.skipif(SIMULATOR, reason="the simulator compiles nothing"),
]
QUICK = [
    (LAYERS[0], "tf32", (9, 0)),
    (LAYERS[0], "tf32x3", (8, 6)),
    (LAYERS[13], "bfloat16", (8, 0)),
]
ALL = [(layer, math, (9, 0)) for layer in LAYERS for math in MATHS]
ALL += [(layer, math, capability) for layer in LAYERS for math in MATHS[:3] for capability in ((8, 0), (8, 6))]


def check(
    layer: Layer, math: str, capability: tuple[int, int], folder: Path, extras: bool = True, channels: int = 0
) -> None:
    plan = layer.plan(math, capability, channels)
    if plan is None and channels:
        return  # no room for several channels: a contiguous copy is made
    check_assembled(toeplitz_source(plan, extras, extras), capability, plan.registers, folder)


@pytest.mark.parametrize(("layer", "math", "capability"), QUICK, ids=str)
def test_some_kernels_assemble_without_spills(layer, math, capability, tmp_path) -> None:
    check(layer, math, capability, tmp_path)


def test_without_bias_and_residual(tmp_path) -> None:
    check(LAYERS[10], "float16", (9, 0), tmp_path, extras=False)


def test_channels_last(tmp_path) -> None:
    check(LAYERS[11], "float16", (9, 0), tmp_path, channels=96)


@pytest.mark.exhaustive
@pytest.mark.parametrize("channels", [124, 249])
@pytest.mark.parametrize(("layer", "math", "capability"), ALL, ids=str)
def test_all_channels_last(layer, math, capability, channels: int, tmp_path) -> None:
    check(layer, math, capability, tmp_path, channels=channels)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("layer", "math", "capability"), ALL, ids=str)
def test_all_kernels_assemble_without_spills(layer, math, capability, tmp_path) -> None:
    check(layer, math, capability, tmp_path)
