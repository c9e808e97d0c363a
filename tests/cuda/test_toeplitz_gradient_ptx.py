"""The weight-gradient kernels through the assembler: no spills, no local memory, the registers as planned."""

from pathlib import Path

import pytest

pytest.importorskip("numba.cuda", reason="the CUDA extra is not installed")

from sw_transplant.cuda.toeplitz.gradient.kernel import gradient_source
from tests.cuda.assembler import check_assembled
from tests.cuda.toeplitz_cases import LAYERS, Layer, strips
from tests.cuda.toeplitz_ptx import NEEDS, cases, check

pytestmark = NEEDS
QUICK = [
    (LAYERS[0], "tf32x3", (8, 0), 0),
    (LAYERS[1], "tf32", (9, 0), 249),
]
MORE = [
    Layer((56, 56), ((7, 7), (51, 5), (5, 51), (3, 3))),
    Layer((100, 100), ((51, 51),)),
    Layer((40, 88), strips(51, 7)),
    Layer((14, 14), ((5, 5), (5, 5))),
]


@pytest.mark.parametrize(("layer", "math", "capability", "channels"), QUICK, ids=str)
def test_some_kernels_assemble_without_spills(
    layer: Layer, math: str, capability: tuple[int, int], channels: int, tmp_path: Path
) -> None:
    plan = layer.gradient_plan(math, capability, channels)
    assert plan is not None
    check_assembled(gradient_source(plan), [capability], plan.registers, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("layer", "math", "channels"), cases(LAYERS + MORE), ids=str)
def test_all_kernels_assemble_without_spills(layer, math, channels: int, tmp_path) -> None:
    check(lambda capability: layer.gradient_plan(math, capability, channels), gradient_source, tmp_path)
