"""Compiling and launching Numba kernels on PyTorch's streams, for every kernel of this package.

Importing this module imports neither Numba nor CUDA: ask `is_available` first. A kernel is compiled on its first launch
for a device: launch it once before capturing it in a CUDA graph.
"""

import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

STATIC_SHARED_LIMIT = 48 * 1024  # bytes of dynamic shared memory that a kernel may use without asking


class KernelSource(NamedTuple):
    """A kernel before compilation: the Python function and its Numba signature, with pointers for tensors."""

    function: Callable[..., None]
    signature: Any
    launch_bounds: tuple[int, int] | None = None  # most threads of a block, fewest blocks on a multiprocessor


@functools.cache
def is_available(device: int) -> bool:
    """Whether Numba kernels run on CUDA device number `device`; warns once, with the reason, where they do not."""
    try:
        from numba import cuda, void

        with torch.cuda.device(device):
            cuda.jit(void())(_nothing)  # compiles, links and loads: all that a missing part or an old driver can break
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        warnings.warn(
            f"The CUDA kernels of sw_transplant are not available on cuda:{device} ({reason}); plain PyTorch is used "
            "instead: same results, more slowly. They need a numba-cuda that matches the driver: "
            "pip install 'numba-cuda[cu13]' (or [cu12]).",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def launch(
    factory: Callable[..., KernelSource],
    key: tuple[Hashable, ...],
    grid: int | tuple[int, ...],
    threads: int | tuple[int, ...],
    arguments: Sequence[Any],
    shared_bytes: int = 0,
) -> None:
    """Launch the kernel `factory(*key)` on the current stream of the device of its tensors; does not wait for it.

    Args:
        factory: makes the kernel; called once for each device and key.
        key: what the kernel is specialised for: dtype, strides, ...
        grid, threads: blocks of the grid and threads of a block.
        arguments: in the order of the signature; a contiguous tensor stands for its pointer. The first one is a tensor.
        shared_bytes: dynamic shared memory of a block; above 48 KB the kernel's limit is raised.

    Raises:
        ValueError: the device does not have that much shared memory.
    """
    device = arguments[0].device.index
    with torch.cuda.device(device):  # Numba compiles for and launches on the device that is current in the driver
        kernel = _compiled(device, factory, key)
        if shared_bytes > STATIC_SHARED_LIMIT:
            _raise_shared_limit(device, kernel, shared_bytes)
        stream = _external_stream(device, torch.cuda.current_stream(device).cuda_stream)
        configured = _configured(kernel, grid, threads, stream, shared_bytes)
        configured(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


def _nothing() -> None:
    """The kernel that `is_available` compiles."""


@functools.cache
def _compiled(device: int, factory: Callable[..., KernelSource], key: tuple[Hashable, ...]) -> Any:
    from numba import cuda

    source = factory(*key)
    return cuda.jit(source.signature, launch_bounds=source.launch_bounds)(source.function)


@functools.cache
def _external_stream(device: int, handle: int) -> Any:
    """One object for each stream: Numba caches launch configurations by the identity of the stream."""
    from numba import cuda

    return cuda.external_stream(handle)


@functools.lru_cache(maxsize=4096)
def _configured(
    kernel: Any, grid: int | tuple[int, ...], threads: int | tuple[int, ...], stream: Any, shared_bytes: int
) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Grid size")  # a small input is no mistake of the caller
        return kernel[grid, threads, stream, shared_bytes]


@functools.cache
def _raise_shared_limit(device: int, kernel: Any, shared_bytes: int) -> None:
    from cuda.bindings import driver

    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if shared_bytes > limit:
        raise ValueError(f"a kernel needs {shared_bytes} bytes of shared memory; cuda:{device} has {limit} for a block")
    handle = next(iter(kernel.overloads.values()))._codelibrary.get_cufunc().handle
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    kernel_handle, device_handle = driver.CUkernel(int(handle)), driver.CUdevice(device)
    (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, kernel_handle, device_handle)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(
            f"cuKernelSetAttribute({shared_bytes} bytes of shared memory) on cuda:{device}: {status.name}"
        )
