"""The shift_add kernels through the real compiler, on any machine: every register stays in place, no local memory."""

import re
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("numba.cuda", reason="needs numba-cuda")

from sw_transplant.cuda.shift_add_kernels import backward_source, forward_source
from tests.cuda.assembler import PTXAS, assemble, compile_to_ptx
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


@pytest.mark.skipif(PTXAS is None, reason="needs ptxas: pip install nvidia-cuda-nvcc")
@pytest.mark.parametrize(
    ("kernel", "dtype", "capability"), sample(product(KERNELS, DTYPES, CAPABILITIES), QUICK), ids=str
)
def test_kernels_need_no_local_memory(kernel, dtype, capability, tmp_path: Path) -> None:
    if kernel == "forward":
        source = forward_source(dtype)
    else:
        source = backward_source(dtype, *((1, 1) if kernel == "backward" else (2, 3)))
    ptx = compile_to_ptx(source, capability)
    report = assemble(ptx, capability, tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, report
    assert ".local" not in ptx
    assert "call" not in re.sub(r"//.*", "", ptx)
    loads = re.findall(r"ld\.(?!param)(\S+)", ptx)
    assert loads
    assert not [load for load in loads if not load.startswith(("global", "shared"))], "loads of unknown memory are slow"
