"""Launching kernels on PyTorch's streams, for every kernel of this package; knows whether there is a GPU for them.

Importing this module imports neither Numba nor CUDA: ask `is_available` first. A kernel is taken from disk (`storage`)
or compiled on its first launch for a device. Only then is Numba imported: a process that finds all its kernels on disk
does without.
"""

from __future__ import annotations

import functools
import importlib.metadata
import threading
import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from sw_transplant.cuda import driver, storage
from sw_transplant.cuda.answers import Passing, Remembered, is_passing
from sw_transplant.cuda.sources import Factory, Job, KernelSource

__all__ = ["Factory", "KernelSource", "answer_lasts", "is_available", "launch", "left_out", "never_left_out"]

STATIC_SHARED_LIMIT = 48 * 1024  # bytes of dynamic shared memory that a kernel may use without asking


def is_available(device: int) -> bool:
    """Whether our kernels run on CUDA device number `device`; warns once, with the reason, where they do not."""
    return not _why_not(device)


def answer_lasts(device: int) -> bool:
    """Whether `is_available` will always say the same of a device; not so where memory was short, say."""
    return _why_not.lasts(device)


@Remembered
def _why_not(device: int) -> str:
    """Why kernels do not run on a device, also as a warning; empty if they do.

    Tries all that a missing part or an old driver can break: a kernel that does nothing is compiled or read from disk,
    and loaded; before it is compiled, the modules of all kernels are imported.
    """
    from sw_transplant.cuda.compiler import NOTHING

    try:
        with torch.cuda.device(device):
            driver.enter(device)
            _loaded(device, NOTHING, ())
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        warnings.warn(
            f"The CUDA kernels of sw_transplant are not available on cuda:{device} ({reason}); plain PyTorch is used "
            f"instead: same results, more slowly. {_remedy(error)}",
            RuntimeWarning,
            stacklevel=4,
        )
        if is_passing(error):
            raise Passing(reason) from error
        return reason
    return ""


def _remedy(error: Exception) -> str:
    """What to do about kernels that cannot be compiled or loaded."""
    install = "pip install 'numba-cuda[cu13]' (or [cu12])"
    if is_passing(error):
        return "This is tried again at the next call; call the model once before capturing a CUDA graph."
    if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("numba.") and _has("numba-cuda"):
        return (
            "numba-cuda is installed, but Numba's own CUDA target is in its place: Python reads no .pth files from "
            "PYTHONPATH. Import _numba_cuda_redirector before Numba, or install numba-cuda into the environment."
        )
    if isinstance(error, ImportError):
        return f"They need Numba and numba-cuda: {install}."
    if isinstance(error, AttributeError) and "numpy" in str(error):
        return (
            f"NumPy {_has('numpy')} is too new for numba-cuda {_has('numba-cuda')}, which uses what NumPy has removed: "
            "pip install 'numpy<2.5'."
        )
    return f"They need a numba-cuda that matches the driver: {install}."


def _has(package: str) -> str:
    """The version of a package that is installed; empty where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def launch(
    factory: Factory,
    key: tuple[Hashable, ...],
    grid: int | tuple[int, ...],
    threads: int | tuple[int, ...],
    arguments: Sequence[Any],
    shared_bytes: int = 0,
) -> None:
    """Launch the kernel `factory(*key)` on the current stream of the device of its tensors; does not wait for it.

    Args:
        factory: makes the kernel; called once for each device and key, if it is not on disk.
        key: what the kernel is specialised for: dtype, strides, ... Its `repr` says all of it.
        grid, threads: blocks of the grid and threads of a block.
        arguments: in the order of the signature; a contiguous tensor stands for its pointer. The first one is a tensor.
        shared_bytes: dynamic shared memory of a block; above 48 KB the kernel's limit is raised.

    Raises:
        ValueError: the device does not have that much shared memory.
    """
    device = arguments[0].device.index
    if driver.current_device() == device:
        _launch_here(device, factory, key, grid, threads, arguments, shared_bytes)
        return
    with torch.cuda.device(device):
        driver.enter(device)  # PyTorch leaves that for later in a thread in which it has not yet used the device
        _launch_here(device, factory, key, grid, threads, arguments, shared_bytes)


def _launch_here(
    device: int,
    factory: Factory,
    key: tuple[Hashable, ...],
    grid: int | tuple[int, ...],
    threads: int | tuple[int, ...],
    arguments: Sequence[Any],
    shared_bytes: int,
) -> None:
    if _Wanted.jobs is not None and not _HERE.runs and (job := _job(device, factory, key)) not in _Wanted.ready:
        if storage.read(job) is None:
            _Wanted.jobs.setdefault(job)
            return
        _Wanted.ready.add(job)
    kernel = _loaded(device, factory, key)
    if shared_bytes > kernel.shared_bytes:
        _raise_shared_limit(device, kernel, shared_bytes)
    stream = torch._C._cuda_getCurrentRawStream(device)
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    driver.run(kernel, grid, threads, shared_bytes, stream, values)


@functools.cache
def _loaded(device: int, factory: Factory, key: tuple[Hashable, ...]) -> driver.Kernel:
    job = _job(device, factory, key)
    cubin = storage.read(job)
    if cubin is None:
        from sw_transplant.cuda.compiler import compile_job

        cubin = compile_job(job)
        storage.write(job, cubin)
    return driver.load(cubin.image, cubin.entry, cubin.parameters, STATIC_SHARED_LIMIT)


def _job(device: int, factory: Factory, key: tuple[Hashable, ...]) -> Job:
    return Job(factory, key, torch.cuda.get_device_capability(device))


def _raise_shared_limit(device: int, kernel: driver.Kernel, shared_bytes: int) -> None:
    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if shared_bytes > limit:
        raise ValueError(f"a kernel needs {shared_bytes} bytes of shared memory; cuda:{device} has {limit} for a block")
    driver.raise_shared_limit(kernel, device, shared_bytes)


class _Wanted:
    """Within `left_out`: the kernels that would have been compiled, and those that need not be."""

    jobs: dict[Job, None] | None = None
    ready: ClassVar[set[Job]] = set()


class _Here(threading.local):
    """Of this thread: whether its launches run within `left_out`, too."""

    runs = False


_HERE = _Here()


@contextmanager
def never_left_out() -> Iterator[None]:
    """Within this, launches of this thread run whatever `left_out` says: somebody looks at their results."""
    _HERE.runs = True
    try:
        yield
    finally:
        _HERE.runs = False


@contextmanager
def left_out() -> Iterator[dict[Job, None]]:
    """Within this, launches of kernels that are not on disk do nothing; gives these kernels, as they come.

    For who wants to know what to compile. All threads are concerned: backward passes run in threads of their own.
    """
    _Wanted.jobs = {}
    _Wanted.ready.clear()
    try:
        yield _Wanted.jobs
    finally:
        _Wanted.jobs = None
