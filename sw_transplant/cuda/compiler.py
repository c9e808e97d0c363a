"""From Python to machine code: Numba's front end, NVVM, and the linker of CUDA. Needs no GPU.

Numba compiles one kernel at a time, whatever the number of threads: what is to be compiled together is shared out to
processes, which leave it on disk (`storage`).
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import subprocess
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from sw_transplant.cuda import storage
from sw_transplant.cuda.sources import Factory, Job, KernelSource
from sw_transplant.cuda.storage import Cubin

KERNELS = (
    "sw_transplant.cuda.shift_add_kernels",
    "sw_transplant.cuda.toeplitz.kernel",
    "sw_transplant.cuda.toeplitz.gradient.kernel",
)
"""The modules that kernels are made in."""
NOTHING = Factory("sw_transplant.cuda.compiler", "nothing_source")
MOST_PROCESSES = 8


def nothing_source() -> KernelSource:
    """A kernel that does nothing, made where all others can be made: what they miss is missed here."""
    from numba import cuda, void

    for module in KERNELS:
        importlib.import_module(module)

    def nothing() -> None:
        pass

    assert cuda is not None
    return KernelSource(nothing, void())


def compile_job(job: Job) -> Cubin:
    """The machine code of a kernel."""
    source = job.factory(*job.key)
    from numba import cuda

    parameters = "".join(_letter(each) for each in source.signature.args)
    ptx, _ = cuda.compile_ptx(
        source.function, source.signature.args, cc=job.capability, launch_bounds=source.launch_bounds
    )
    (entry,) = re.findall(r"\.entry\s+([\w$]+)", ptx)
    return Cubin(entry, parameters, link(ptx, job.capability)[0])


def link(ptx: str, capability: tuple[int, int], *flags: str) -> tuple[bytes, str]:
    """The machine code of PTX, and what the assembler says of it: registers and spills, with the flag -v."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch=storage.architecture(capability), ptxas_options=list(flags) or None)
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    return bytes(linker.link("cubin").code), linker.get_info_log()


def _letter(parameter: Any) -> str:
    from numba.cuda import types

    if isinstance(parameter, types.CPointer):
        return "p"
    letters = {types.int32: "i", types.int64: "l", types.float32: "f", types.float64: "d"}
    return letters[parameter]


def compile_together(jobs: Sequence[Job], processes: int | None = None) -> None:
    """Compiles kernels that are not on disk yet, in several processes, and leaves them there.

    What fails here fails again, with its reason, where it is compiled for a launch.

    Args:
        jobs: what to compile.
        processes: how many at once; by default one for each core, up to :data:`MOST_PROCESSES`.
    """
    if storage.folder() is None:
        return
    missing = [job for job in jobs if storage.read(job) is None]
    count = min(len(missing), processes or min(os.cpu_count() or 1, MOST_PROCESSES))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "sw_transplant.cuda.compiler"]
    shares = [missing[i::count] for i in range(count)]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) for _ in shares]
    for process, share in zip(running, shares, strict=True):
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(share))
        process.stdin.close()
    for process in running:
        process.wait()


def compile_and_keep(jobs: Sequence[Job]) -> None:
    """Compiles kernels one after the other, and leaves them on disk; says on stderr which fail."""
    for job in jobs:
        try:
            storage.write(job, compile_job(job))
        except Exception:
            print(f"sw_transplant: {storage.describe(job)}: {traceback.format_exc()}", file=sys.stderr)


if __name__ == "__main__":
    compile_and_keep(pickle.load(sys.stdin.buffer))
