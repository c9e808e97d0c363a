"""Kernels through the compiler and the assembler of CUDA, on any machine: PTX, registers, spills."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

from numba import cuda

from sw_transplant.cuda.sources import KernelSource


def find_ptxas() -> str | None:
    """The assembler: on the path, or in the wheel nvidia-cuda-nvcc."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for found in sorted(Path(folder).glob("*/bin/ptxas")):
            return str(found)
    return shutil.which("ptxas")


PTXAS = find_ptxas()


def compile_to_ptx(source: KernelSource, capability: tuple[int, int] = (9, 0)) -> str:
    arguments = source.signature.args
    ptx, _ = cuda.compile_ptx(source.function, arguments, cc=capability, launch_bounds=source.launch_bounds)
    return ptx


def check_assembled(source: KernelSource, capability: tuple[int, int], registers: int, folder: Path) -> str:
    """Asserts that a kernel keeps to its registers and needs no local memory; returns its PTX."""
    ptx = compile_to_ptx(source, capability)
    (folder / "kernel.ptx").write_text(ptx)
    command = [str(PTXAS), "-v", f"-arch=sm_{capability[0]}{capability[1]}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = done.stderr
    (numbers,) = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert numbers == ("0", "0", "0"), report
    (used,) = re.findall(r"Used (\d+) registers", report)
    assert int(used) <= registers
    assert re.search(r"\.extern \.shared \.align 16", ptx)
    assert ".f64" not in ptx
    assert "mma.sync" in ptx
    return ptx
