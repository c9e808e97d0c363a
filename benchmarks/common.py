"""What the benchmarks share: timing of peers in turns, the limits of a device, precisions."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
from torch import Tensor

from sw_transplant.check.verify import BOUNDS, TF32_BOUND

T = TypeVar("T")
Samples = Mapping[str, Sequence[float]]
"""Milliseconds of every peer, round by round; peers that failed are absent."""

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LEAST_ROUNDS = 3
KERNELS, WITH_PYTHON, WALL_CLOCK = "kernels", "with Python", "wall clock"
LEAST_FLUSHES, MOST_FLUSHES = 4, 1024  # of 256 MiB: about 0.07 ms each on an H200


# ---- timing ----------------------------------------------------------------------------------------------------------


class Clock:
    """Time of one call in milliseconds.

    Args:
        device: where the calls run.
        cold: on a GPU, time between events, right after the L2 cache was flushed. The flush is repeated until the whole
            call is queued behind it, so that the time is that of its kernels, and no Python is in it; that is seen from
            the first event, which must not have been reached when the call returns. Otherwise the time is that of a
            wall clock, with the device idle before and after.
        least_ms: repeat shorter calls within one measurement until it takes this long (not if ``cold``).

    Attributes:
        timed: what the last measurement was of: ``KERNELS``, ``WITH_PYTHON`` where no flush was long enough, or
            ``WALL_CLOCK``.
    """

    def __init__(self, device: torch.device, *, cold: bool = False, least_ms: float = 0) -> None:
        self.device, self.least_ms = device, least_ms
        self.cold = cold and device.type == "cuda"
        self.timed = KERNELS if self.cold else WALL_CLOCK
        self._flush = torch.empty(2**28, dtype=torch.int8, device=device) if self.cold else None
        self._flushes = LEAST_FLUSHES

    def calls(self, function: Callable[[], object]) -> int:
        """Warms up, and says how many calls one measurement takes."""
        function()
        self._flushes = LEAST_FLUSHES
        ms = self(function)
        return 1 if self.cold else max(1, math.ceil(self.least_ms / max(ms, 1e-3)))

    def __call__(self, function: Callable[[], object], calls: int = 1) -> float:
        if self._flush is not None:
            return self._between_events(function, self._flush)
        self._wait()
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        self._wait()
        return 1e3 * (time.perf_counter() - begin) / calls

    def _between_events(self, function: Callable[[], object], flush: Tensor) -> float:
        while True:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(self._flushes):
                flush.zero_()
            start.record()
            function()
            end.record()
            queued = not start.query()
            torch.cuda.synchronize(self.device)
            if queued or self._flushes >= MOST_FLUSHES:
                self.timed = KERNELS if queued else WITH_PYTHON
                return start.elapsed_time(end)
            self._flushes *= 2

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Peers:
    """The candidates of one comparison: named calls that are timed in turns, and why those that failed did.

    Attributes:
        runs: what to time. A candidate that fails leaves it.
        reasons: why there is no time of a candidate.
        timed: what was timed of each (:attr:`Clock.timed`); Python is in it if it was in any round.
    """

    def __init__(self) -> None:
        self.runs: dict[str, Callable[[], object]] = {}
        self.reasons: dict[str, str] = {}
        self.timed: dict[str, str] = {}

    def attempt(self, name: str, function: Callable[[], T]) -> T | None:
        """What a step of a candidate returns; if it fails, None, and the candidate is out."""
        try:
            return function()
        except Exception as error:
            self.fail(name, describe(error))
        gc.collect()  # what the failed call held, before the next candidate needs the room
        if torch.cuda.is_available():
            with suppress(RuntimeError):
                torch.cuda.empty_cache()
        return None

    def fail(self, name: str, reason: str) -> None:
        """Takes a candidate out."""
        self.reasons[name] = reason
        self.runs.pop(name, None)

    def time(self, clock: Clock, repeats: int, seconds: float) -> dict[str, list[float]]:
        """Rounds of A B C, C B A, so that drift meets all alike. A sample is the mean of a candidate's two times.

        Args:
            clock: how to time.
            repeats: rounds at most.
            seconds: start no other round after so long, once there are ``LEAST_ROUNDS``.
        """
        calls = {}
        for name, run in list(self.runs.items()):
            calls[name] = self.attempt(name, lambda run=run: clock.calls(run)) or 1
        samples: dict[str, list[float]] = {name: [] for name in self.runs}
        begin = time.perf_counter()
        for done in range(repeats):
            if done >= LEAST_ROUNDS and time.perf_counter() - begin > seconds:
                break
            order = list(self.runs)
            times: dict[str, list[float]] = {name: [] for name in order}
            for name in order + order[::-1]:
                if name in self.runs:
                    ms = self.attempt(name, lambda run=self.runs[name], n=calls[name]: clock(run, n))
                    times[name].append(math.nan if ms is None else ms)
                    if self.timed.get(name) != WITH_PYTHON:
                        self.timed[name] = clock.timed
            for name in self.runs:
                samples[name].append(statistics.fmean(times[name]))
        return {name: samples[name] for name in self.runs if samples[name]}


def what_was_timed(timed: Mapping[str, str]) -> str | None:
    """One word for a row: what all its candidates were timed by, or ``WITH_PYTHON`` if that is so of any."""
    found = set(timed.values())
    return WITH_PYTHON if WITH_PYTHON in found else next(iter(found), None)


def median(samples: Samples, name: str) -> float | None:
    """Median time of a peer; None if it has none."""
    return statistics.median(samples[name]) if name in samples else None


def speedup(samples: Samples, slow: str | None, fast: str | None) -> float | None:
    """How many times as fast one peer is as the other: the median over the rounds; None if one has no times."""
    if slow not in samples or fast not in samples:
        return None
    return statistics.median(a / b for a, b in zip(samples[slow], samples[fast], strict=True))


def fastest(samples: Samples, names: Sequence[str]) -> str | None:
    """The peer of least median time among these; None if none has times."""
    return min((name for name in names if name in samples), key=lambda n: statistics.median(samples[n]), default=None)


def describe(error: BaseException) -> str:
    """The kind of an error, and what it says: on one line, as much as fits a cell of a file."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


# ---- the limits of a device ------------------------------------------------------------------------------------------


def median_ms(function: Callable[[], object], clock: Clock, repeats: int) -> float:
    """Median time of one call."""
    function()
    return statistics.median(clock(function) for _ in range(repeats))


def copy_rate(clock: Clock, repeats: int) -> float:
    """Bytes read and written each second by a large copy."""
    size = 2**29 if clock.device.type == "cuda" else 2**25
    source = torch.ones(size, dtype=torch.float32, device=clock.device)
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / median_ms(lambda: target.copy_(source), clock, repeats)


def product_rate(clock: Clock, repeats: int, dtype: torch.dtype) -> float:
    """Floating-point operations each second of a large matrix product; in float32 without TF32, of the FMA units."""
    n = 8192 if clock.device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=clock.device).to(dtype)
    return 2e3 * n**3 / median_ms(lambda: a @ b, clock, repeats)


# ---- precisions ------------------------------------------------------------------------------------------------------


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """Sets TF32 on for "tf32" and off for all others; gives the dtype.

    By the older of PyTorch's two interfaces: after the newer one some versions of torch.compile fail, while this one
    answers both.
    """
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = name == "tf32"
        yield PRECISIONS[name]
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def unsupported(name: str, device: torch.device) -> str | None:
    """Why a precision does not exist on a device; None if it does."""
    if name == "tf32" and device.type != "cuda":
        return "TF32 exists on CUDA devices only"
    if name == "tf32" and torch.cuda.get_device_capability(device) < (8, 0):
        return "this GPU has no TF32"
    return None


def bound(name: str) -> float:
    """The relative RMS error up to which an output of this precision is right."""
    return TF32_BOUND if name == "tf32" else BOUNDS[PRECISIONS[name]]


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS error."""
    return ((actual.double() - expected).norm() / expected.norm()).item()
