"""What bodies of Toeplitz kernels need to run in Numba's CUDA simulator: warps that meet, memory, tensors as arrays."""

import sys
import threading
import time

import numpy as np
import torch
from numba.cuda.simulator import kernelapi

from sw_transplant.cuda import intrinsics


class Warps:
    """Where the threads of a warp hand their arguments to one of them: by block and warp."""

    def __init__(self):
        self.lock, self.meetings = threading.Lock(), {}

    def run(self, function, lane, arguments):
        """function(list of all lanes' arguments), once for the warp; every lane gets its result."""
        thread = threading.current_thread()  # the simulator's, which knows its place
        place = (thread.blockIdx.x, thread.threadIdx.x // 32)
        with self.lock:
            meeting = self.meetings.setdefault(place, [threading.Barrier(32), [None] * 32, None])
        barrier, slots, _ = meeting
        slots[lane] = arguments
        if barrier.wait(60) == 0:
            meeting[2] = function(slots)
        barrier.wait(60)
        result = meeting[2]
        barrier.wait(60)
        return result


def memory(shared):
    """The words of shared memory."""
    return np.asarray(getattr(shared, "_ary", shared)).view(np.uint32)


def vector(slots, i):
    """Argument i of all lanes."""
    return np.array([slot[i] for slot in slots], np.int64)


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory, contiguous or channels_last: float32, or uint16 for both 16-bit types."""
    flat = (tensor if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1)).contiguous().flatten()
    return flat.numpy() if tensor.dtype == torch.float32 else flat.view(torch.int16).numpy().view(np.uint16)


class Poisoned(kernelapi.FakeCUDAShared):
    """Shared memory that is full of NaN, as it may be on a GPU."""

    def __init__(self, size):
        super().__init__(size)
        self._dynshared.fill(-1)


def poison_shared_memory():
    kernelapi.FakeCUDAShared = Poisoned


def main(cases, check):
    """check(case, math) for every case with one of its maths, each in turn; with all of them after --all.

    Words of the command line choose the cases whose name has one of them in it.
    """
    assert intrinsics.SIMULATOR
    poison_shared_memory()
    chosen = [word for word in sys.argv[1:] if word != "--all"]
    for number, case in enumerate(cases):
        turn = number % len(case.maths)
        for math in case.maths if "--all" in sys.argv else case.maths[turn : turn + 1]:
            if not chosen or any(word in case.name for word in chosen):
                start = time.time()
                check(case, math)
                print(f"   {time.time() - start:.1f} s")
