"""The Toeplitz kernels through the assembler, without a GPU: no spills, no local memory, the registers as planned."""

from pathlib import Path

import pytest

pytest.importorskip("numba.cuda", reason="the CUDA extra is not installed")

from sw_transplant.cuda.toeplitz.kernel import toeplitz_source
from tests.cuda.assembler import check_assembled
from tests.cuda.toeplitz_cases import LAYERS, Layer
from tests.cuda.toeplitz_ptx import NEEDS, cases, check

pytestmark = NEEDS
QUICK = [
    (LAYERS[0], "tf32x3", (8, 6), 0, True),
    (LAYERS[13], "bfloat16", (8, 0), 0, True),
    (LAYERS[11], "float16", (9, 0), 96, False),
]


@pytest.mark.parametrize(("layer", "math", "capability", "channels", "extras"), QUICK, ids=str)
def test_some_kernels_assemble_without_spills(
    layer: Layer, math: str, capability: tuple[int, int], channels: int, extras: bool, tmp_path: Path
) -> None:
    plan = layer.plan(math, capability, channels)
    assert plan is not None
    check_assembled(toeplitz_source(plan, extras, extras), [capability], plan.registers, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("layer", "math", "channels"), cases(LAYERS), ids=str)
def test_all_kernels_assemble_without_spills(layer, math, channels: int, tmp_path) -> None:
    check(
        lambda capability: layer.plan(math, capability, channels),
        lambda plan: toeplitz_source(plan, True, True),
        tmp_path,
    )
