"""Launches with `driver.c` in the place of CUDA's driver. A command of its own: drive.py COMMAND, or all of them.

LD_LIBRARY_PATH says where libcuda.so.1 is; SW_TRANSPLANT_CACHE is a folder of its own.
"""

import contextlib
import ctypes
import sys
import threading
import time
import types

import pytest
import torch

from sw_transplant.cuda import driver, launch, storage
from sw_transplant.cuda.sources import Factory, Job
from sw_transplant.cuda.storage import Cubin

NOBODY = Factory("tests.cuda.test_storage", "nobody_makes_this")
FAKE = ctypes.CDLL("libcuda.so.1")
CUBIN = Cubin("a_kernel", "pppii", b"\x7fELF and more")


class There(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    device = property(lambda self: torch.device("cuda", 0))  # type: ignore[assignment]


def seen(count: int) -> list[int]:
    return list((ctypes.c_int64 * count).in_dll(FAKE, "seen"))


def counted(name: str) -> int:
    return ctypes.c_int.in_dll(FAKE, name).value


def arguments() -> list:
    x = torch.zeros(3).as_subclass(There)
    return [x, x, x, -7, 2**31 - 1]


def run(key: tuple, shared_bytes: int = 0) -> list:
    given = arguments()
    launch.launch(NOBODY, key, (5, 2), 64, given, shared_bytes)
    return given


def values() -> None:
    """What a kernel gets, from disk, without Numba."""
    storage.write(Job(NOBODY, ("values",), (9, 0)), CUBIN)
    given = run(("values",), 1000)
    pointer = given[0].data_ptr()
    assert seen(13) == [5, 2, 1, 64, 1, 1, 1000, 77, pointer, pointer, pointer, -7, 2**31 - 1], seen(13)
    assert counted("loads") == 1
    run(("values",))
    assert counted("loads") == 1
    assert counted("launches") == 2
    assert not {"numba", "numba.cuda"} & set(sys.modules), "Numba was imported"
    with pytest.raises(ValueError, match="got 4 arguments, expected 5"):
        launch.launch(NOBODY, ("values",), 1, 1, given[:-1])


def threads() -> None:
    """A thread that has used no GPU yet has no context: the first launch in it gets one."""
    storage.write(Job(NOBODY, ("threads",), (9, 0)), CUBIN)
    problems: list[BaseException] = []

    def first() -> None:
        try:
            assert driver.current_device() is None
            run(("threads",))
            assert driver.current_device() == 0
        except BaseException as problem:
            problems.append(problem)

    for _ in range(2):
        other = threading.Thread(target=first)
        other.start()
        other.join()
    assert not problems, problems


def shared() -> None:
    """More than 48 KB of shared memory are asked for; more than the device has are refused."""
    storage.write(Job(NOBODY, ("shared",), (9, 0)), CUBIN)
    run(("shared",), 200_000)
    assert seen(7)[6] == 200_000
    with pytest.raises(ValueError, match="300000 bytes of shared memory; cuda:0 has 232448"):
        run(("shared",), 300_000)


def left_out() -> None:
    """What is not on disk is noted instead of being compiled."""
    storage.write(Job(NOBODY, ("kept",), (9, 0)), CUBIN)
    before = counted("launches")
    with launch.left_out() as jobs:
        run(("kept",))
        run(("missing",))
        run(("missing",))
        with launch.never_left_out(), pytest.raises(AttributeError, match="nobody_makes_this"):
            run(("missing",))
    assert [job.key for job in jobs] == [("missing",)]
    assert counted("launches") == before + 1


def refused() -> None:
    """An image that the driver does not take is an error that says so; the next one is tried anew."""
    storage.write(Job(NOBODY, ("refused",), (9, 0)), CUBIN._replace(image=b"no image"))
    with pytest.raises(RuntimeError, match="cuLibraryLoadData: CUDA_ERROR_INVALID_IMAGE"):
        run(("refused",))
    storage.write(Job(NOBODY, ("refused",), (9, 0)), CUBIN)
    run(("refused",))


def microseconds() -> None:
    """What Python takes for a launch; no test, a number."""
    storage.write(Job(NOBODY, ("us",), (9, 0)), CUBIN)
    given = arguments()
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(5000):
            launch.launch(NOBODY, ("us",), 5, 64, given)
        print(f"{200 * (time.perf_counter() - begin):.1f} us a launch")


COMMANDS = [values, threads, shared, left_out, refused]

if __name__ == "__main__":
    # What the driver says through PyTorch; a stream that is not the first.
    torch.cuda.get_device_capability = lambda _: (9, 0)  # type: ignore[assignment]
    properties = types.SimpleNamespace(shared_memory_per_block_optin=232448)
    torch.cuda.get_device_properties = lambda _: properties  # type: ignore[assignment]
    torch._C._cuda_getCurrentRawStream = lambda _: 77
    torch.cuda.device = lambda _: contextlib.nullcontext()  # type: ignore[assignment, misc]
    for command in [each for each in [*COMMANDS, microseconds] if each.__name__ in sys.argv[1:]] or COMMANDS:
        command()
        print(command.__name__)
