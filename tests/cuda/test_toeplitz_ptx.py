"""The Toeplitz kernels through the assembler, without a GPU: no spills, no local memory, the registers as planned."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("numba.cuda", reason="the CUDA extra is not installed")

from numba import cuda

from sw_transplant.cuda.intrinsics import SIMULATOR
from sw_transplant.cuda.toeplitz.kernel import toeplitz_source
from sw_transplant.cuda.toeplitz.plan import Plan
from tests.cuda.toeplitz_cases import LAYERS, MATHS, Layer


def find_ptxas() -> str | None:
    """The assembler: on the path, or in the wheel nvidia-cuda-nvcc."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for found in sorted(Path(folder).glob("*/bin/ptxas")):
            return str(found)
    return shutil.which("ptxas")


PTXAS = find_ptxas()
pytestmark = [
    pytest.mark.skipif(PTXAS is None, reason="needs ptxas: pip install nvidia-cuda-nvcc"),
    pytest.mark.skipif(SIMULATOR, reason="the simulator compiles nothing"),
]
QUICK = [
    (LAYERS[0], "tf32", (9, 0)),
    (LAYERS[0], "float16", (9, 0)),
    (LAYERS[0], "tf32x3", (8, 6)),
    (LAYERS[1], "tf32", (8, 0)),
    (LAYERS[11], "bfloat16", (9, 0)),
    (LAYERS[13], "tf32", (8, 0)),
]
ALL = [(layer, math, (9, 0)) for layer in LAYERS for math in MATHS]
ALL += [(layer, math, capability) for layer in LAYERS for math in MATHS[:3] for capability in ((8, 0), (8, 6))]


def assemble(plan: Plan, capability: tuple[int, int], folder: Path, bias: bool, residual: bool) -> tuple[str, str]:
    """PTX, and what the assembler says of it."""
    source = toeplitz_source(plan, bias, residual)
    arguments = source.signature.args
    ptx, _ = cuda.compile_ptx(source.function, arguments, cc=capability, launch_bounds=source.launch_bounds)
    (folder / "kernel.ptx").write_text(ptx)
    command = [PTXAS, "-v", f"-arch=sm_{capability[0]}{capability[1]}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ptx, done.stderr


def check(layer: Layer, math: str, capability: tuple[int, int], folder: Path, extras: bool = True) -> None:
    plan = layer.plan(math, capability)
    ptx, report = assemble(plan, capability, folder, extras, extras)
    (numbers,) = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    (registers,) = re.findall(r"Used (\d+) registers", report)
    assert numbers == ("0", "0", "0"), (plan, report)
    assert int(registers) <= plan.registers
    assert re.search(r"\.extern \.shared \.align 16", ptx)
    assert ".f64" not in ptx
    assert "mma.sync" in ptx


@pytest.mark.parametrize(("layer", "math", "capability"), QUICK, ids=str)
def test_some_kernels_assemble_without_spills(layer, math, capability, tmp_path) -> None:
    check(layer, math, capability, tmp_path)


def test_without_bias_and_residual(tmp_path) -> None:
    check(LAYERS[10], "float16", (9, 0), tmp_path, extras=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("layer", "math", "capability"), ALL, ids=str)
def test_all_kernels_assemble_without_spills(layer, math, capability, tmp_path) -> None:
    check(layer, math, capability, tmp_path)
