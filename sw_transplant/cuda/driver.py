"""Loading compiled kernels and launching them, by the CUDA driver alone: neither Numba nor a compiler is needed.

PyTorch makes contexts and streams; this only uses them. A thread in which nothing has run yet has no context, and gets
that of the device.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

PARAMETERS = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int32,
    "l": ctypes.c_int64,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}
"""What a kernel may be given: a pointer, integers of 32 and 64 bits, floats of 32 and 64 bits."""


class Kernel:
    """A kernel on a device, ready to be launched.

    Attributes:
        handle: the driver's.
        types: of its parameters.
        shared_bytes: the most dynamic shared memory that a launch may ask for as it stands.
    """

    def __init__(self, handle: Any, launchable: Any, types: tuple[Any, ...], shared_bytes: int) -> None:
        self.handle, self.launchable, self.types, self.shared_bytes = handle, launchable, types, shared_bytes


@functools.cache
def _cuda() -> Any:
    """The driver's functions; imported when first needed."""
    from cuda.bindings import driver

    return driver


def version() -> int:
    """The version of CUDA that the driver is of, 13020 for 13.2; 0 where there is no driver."""
    try:
        status, number = _cuda().cuDriverGetVersion()
    except Exception:  # what it raises where there is no driver depends on its version
        return 0
    return 0 if status else int(number)


def current_device() -> int | None:
    """The device that the driver would launch on in this thread; None where the thread has no context."""
    status, device = _cuda().cuCtxGetDevice()
    return None if status else int(device)


def enter(device: int) -> None:
    """Makes the context that PyTorch uses on a device the current one of this thread, if there is none of it."""
    if current_device() != device:
        _check("cuCtxSetCurrent", _cuda().cuCtxSetCurrent(_context(device)))


@functools.cache
def _context(device: int) -> Any:
    driver = _cuda()
    _check("cuInit", driver.cuInit(0))
    number = _check("cuDeviceGet", driver.cuDeviceGet(device))
    return _check("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(number))


def load(image: bytes, entry: str, parameters: str, shared_bytes: int) -> Kernel:
    """Loads a kernel onto the current device.

    Args:
        image, entry, parameters: as in :class:`storage.Cubin`.
        shared_bytes: dynamic shared memory that a kernel may use without asking.

    Raises:
        RuntimeError: the driver does not take it.
    """
    driver = _cuda()
    with _allowed_while_captured():
        library = _check("cuLibraryLoadData", driver.cuLibraryLoadData(image, None, None, 0, None, None, 0))
        handle = _check("cuLibraryGetKernel", driver.cuLibraryGetKernel(library, entry.encode()))
        _check("cuKernelGetFunction", driver.cuKernelGetFunction(handle))  # loads now what would wait for a launch
    types = tuple(PARAMETERS[letter] for letter in parameters)
    return Kernel(handle, driver.CUfunction(int(handle)), types, shared_bytes)


@contextmanager
def _allowed_while_captured() -> Iterator[None]:
    """Loading takes memory, which a thread that captures a CUDA graph may not; but nothing of it is in the graph."""
    driver = _cuda()
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = _check("cuThreadExchangeStreamCaptureMode", driver.cuThreadExchangeStreamCaptureMode(relaxed))
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)


def raise_shared_limit(kernel: Kernel, device: int, shared_bytes: int) -> None:
    """Lets launches of a kernel ask for so much dynamic shared memory."""
    driver = _cuda()
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    result = driver.cuKernelSetAttribute(attribute, shared_bytes, kernel.handle, driver.CUdevice(device))
    _check(f"cuKernelSetAttribute({shared_bytes} bytes of shared memory) on cuda:{device}", result)
    kernel.shared_bytes = shared_bytes


def run(
    kernel: Kernel,
    grid: int | tuple[int, ...],
    threads: int | tuple[int, ...],
    shared_bytes: int,
    stream: int,
    values: Sequence[Any],
) -> None:
    """Launches a kernel in the current context; does not wait for it.

    Raises:
        ValueError: as many values as the kernel has no parameters.
        RuntimeError: the driver refuses.
    """
    driver = _cuda()
    if len(values) != len(kernel.types):
        raise ValueError(f"a kernel got {len(values)} arguments, expected {len(kernel.types)}")
    blocks, block = _three(grid), _three(threads)
    parameters = (tuple(values), kernel.types)
    result = driver.cuLaunchKernel(kernel.launchable, *blocks, *block, shared_bytes, stream, parameters, 0)
    _check("cuLaunchKernel", result)


def _three(sizes: int | tuple[int, ...]) -> tuple[int, ...]:
    return (sizes, 1, 1) if isinstance(sizes, int) else (*sizes, 1, 1)[:3]


def _check(call: str, result: tuple[Any, ...]) -> Any:
    """What a call of the driver returned beside its status.

    Raises:
        RuntimeError: the call failed.
    """
    if result[0]:
        raise RuntimeError(f"{call}: {result[0].name}")
    return result[1] if len(result) > 1 else None
