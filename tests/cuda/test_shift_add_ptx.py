"""The shift_add kernels through the real compiler, on any machine: every register stays in place, no local memory."""

import importlib.util
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("numba.cuda", reason="needs numba-cuda")

from numba import cuda

from sw_transplant.cuda.shift_add_kernels import backward_source, forward_source
from sw_transplant.cuda.sources import KernelSource
from tests.sampling import sample

KERNELS = ["forward", "backward", "backward, strides 2 and 3"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
CAPABILITIES = [(8, 0), (9, 0)]
QUICK = [
    ("forward", torch.bfloat16, (8, 0)),
    ("backward", torch.float16, (9, 0)),
    ("backward", torch.float64, (8, 0)),
    ("backward, strides 2 and 3", torch.float32, (9, 0)),
]


@pytest.fixture(scope="session")
def ptxas() -> str:
    """The assembler of CUDA, from the path or from the wheel nvidia-cuda-nvcc."""
    found = shutil.which("ptxas")
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else []:
        for binary in sorted(Path(folder).glob("**/bin/ptxas")):
            found = str(binary)
    if found is None:
        pytest.skip("needs ptxas: pip install nvidia-cuda-nvcc")
    return found


def compile_kernel(source: KernelSource, capability: tuple[int, int], ptxas: str, folder: Path) -> tuple[str, str]:
    """PTX of a kernel, and what ptxas says about it."""
    ptx, _ = cuda.compile_ptx(source.function, source.signature, cc=capability, launch_bounds=source.launch_bounds)
    file = folder / "kernel.ptx"
    file.write_text(ptx)
    command = [ptxas, "-v", f"-arch=sm_{capability[0]}{capability[1]}", str(file), "-o", str(folder / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ptx, done.stderr


@pytest.mark.parametrize(
    ("kernel", "dtype", "capability"), sample(product(KERNELS, DTYPES, CAPABILITIES), QUICK), ids=str
)
def test_kernels_need_no_local_memory(kernel, dtype, capability, ptxas: str, tmp_path: Path) -> None:
    if kernel == "forward":
        source = forward_source(dtype)
    else:
        source = backward_source(dtype, *((1, 1) if kernel == "backward" else (2, 3)))
    ptx, report = compile_kernel(source, capability, ptxas, tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, report
    assert ".local" not in ptx
    assert "call" not in re.sub(r"//.*", "", ptx)
    loads = re.findall(r"ld\.(?!param)(\S+)", ptx)
    assert loads
    assert not [load for load in loads if not load.startswith(("global", "shared"))], "loads of unknown memory are slow"
