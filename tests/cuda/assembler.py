"""Kernels through the compiler and the assembler of CUDA, on any machine: PTX, registers, spills."""

import functools
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from numba import cuda
from numba.cuda import compiler

from sw_transplant.cuda.compiler import link
from sw_transplant.cuda.sources import KernelSource


def find_ptxas() -> str | None:
    """The assembler: on the path, or in the wheel nvidia-cuda-nvcc."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for found in sorted(Path(folder).glob("*/bin/ptxas")):
            return str(found)
    return shutil.which("ptxas")


PTXAS = find_ptxas()
MOST_SPILLED = {(10, 0): 32}
"""Bytes. The assembler for sm_100 takes up to 40 registers more than that for sm_90, for the same kernels; no such
device was at hand to tune plans for, and 55 x 57 maps in 16 bits spill 28 bytes there. Elsewhere nothing is spilled."""


@functools.cache
def assembles(capability: tuple[int, int]) -> bool:
    """Whether the assembler knows an architecture: new ones come with new toolkits."""
    known = subprocess.run([str(PTXAS), "--help"], capture_output=True, text=True).stdout if PTXAS else ""
    return f"'sm_{capability[0]}{capability[1]}'" in known


def compile_to_ptx(source: KernelSource, capability: tuple[int, int] = (9, 0)) -> str:
    arguments = source.signature.args
    ptx, _ = cuda.compile_ptx(source.function, arguments, cc=capability, launch_bounds=source.launch_bounds)
    return ptx


def check_assembled(
    source: KernelSource, capabilities: Sequence[tuple[int, int]], registers: int, folder: Path
) -> list[int]:
    """Asserts that a kernel keeps to its registers and needs no local memory, on each of some architectures.

    Numba's front end takes longer than all that follows, and knows nothing of the architecture: it runs once.

    Returns:
        Registers of a thread, for each capability.
    """
    library, _ = compiler._compile_pyfunc_with_fixup(
        source.function,
        source.signature.args,
        cc=capabilities[0],
        device=False,
        abi="numba",
        launch_bounds=source.launch_bounds,
    )
    return [_check(library.get_asm_str(cc=each), each, registers, folder) for each in capabilities]


def assemble(ptx: str, capability: tuple[int, int], folder: Path) -> str:
    """What the assembler says of PTX: registers, local memory, spills. Its files lie in the folder."""
    (folder / "kernel.ptx").write_text(ptx)
    command = [str(PTXAS), "-v", f"-arch=sm_{capability[0]}{capability[1]}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def _spilled(report: str) -> int:
    """Bytes of a thread's local memory, and of what is stored there."""
    (numbers,) = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return max(map(int, numbers))


def _check(ptx: str, capability: tuple[int, int], registers: int, folder: Path) -> int:
    first = report = assemble(ptx, capability, folder)
    if _spilled(report):  # the linker that compiles for a launch has an assembler of its own: that one decides
        report = link(ptx, capability, "-v")[1]
    assert _spilled(report) <= MOST_SPILLED.get(capability, 0), f"ptxas: {first}\nlinker: {report}"
    (used,) = re.findall(r"Used (\d+) registers", report)
    assert int(used) <= registers, report
    assert re.search(r"\.extern \.shared \.align 16", ptx)
    assert ".f64" not in ptx
    assert "mma.sync" in ptx
    return int(used)
