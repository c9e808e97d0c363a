"""Compiled kernels on disk: a second process need not compile them.

One file for each kernel, named after everything that its machine code depends on: the kernel and its plan, the
architecture, this package's kernel sources, the versions of Numba and what it compiles with, and the driver's. A file
that is not whole is treated as if it were not there. Files are written under another name and then renamed: processes
that compile the same kernel at the same time replace each other's file by an equal one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

from sw_transplant.cuda import driver
from sw_transplant.cuda.sources import Job

VARIABLE = "SW_TRANSPLANT_CACHE"
MAGIC = b"sw_transplant kernel 1\n"
SUFFIX, PART = ".kernel", ".part"
MADE_WITH = (
    "numba",
    "numba-cuda",
    "llvmlite",
    "numpy",
    "cuda-core",
    "cuda-bindings",
    "nvidia-nvvm",
    "nvidia-nvjitlink",
)


class Cubin(NamedTuple):
    """A compiled kernel.

    Attributes:
        entry: its name in the image.
        parameters: a letter for each, as :data:`driver.PARAMETERS` has them.
        image: machine code for one architecture.
    """

    entry: str
    parameters: str
    image: bytes


class Entry(NamedTuple):
    """A file of the cache: what it has, for which architecture, how large it is, and whether it is whole."""

    path: Path
    kernel: str
    architecture: str
    size: int
    whole: bool


def folder() -> Path | None:
    """Where kernels are kept: ``SW_TRANSPLANT_CACHE``, else the user's cache folder; None where they are not.

    They are not where the variable is empty, or where it is not set and platformdirs is not installed.
    """
    stated = os.environ.get(VARIABLE)
    if stated is not None:
        return Path(stated).expanduser() if stated else None
    try:
        from platformdirs import user_cache_path
    except ImportError:
        return None
    return user_cache_path("sw_transplant", appauthor=False) / "kernels"


def read(job: Job) -> Cubin | None:
    """The compiled kernel; None where it is not kept, or its file is damaged."""
    place = folder()
    if place is None:
        return None
    try:
        found = _parse((place / _name(job)).read_bytes())
    except OSError:
        return None
    return found[0] if found else None


def write(job: Job, cubin: Cubin) -> None:
    """Keeps a compiled kernel; warns once where that is not possible."""
    place = folder()
    if place is None:
        return
    header = {
        "kernel": describe(job),
        "architecture": architecture(job.capability),
        "entry": cubin.entry,
        "parameters": cubin.parameters,
        "length": len(cubin.image),
        "sha256": _hash(cubin),
    }
    data = MAGIC + json.dumps(header).encode() + b"\n" + cubin.image
    part = None
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place, suffix=PART, delete=False) as file:
            part = Path(file.name)
            file.write(data)
        part.replace(place / _name(job))
    except OSError as error:
        if part is not None:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        _complain(str(place), f"{type(error).__name__}: {error}")


@functools.cache
def _complain(place: str, reason: str) -> None:
    warnings.warn(
        f"sw_transplant: compiled kernels cannot be kept in {place} ({reason}); every process compiles its own. Name a "
        f"folder that can be written to in {VARIABLE}, or leave that empty to keep none.",
        RuntimeWarning,
        stacklevel=2,
    )


def entries() -> list[Entry]:
    """What is kept, by name."""
    place, found = folder(), []
    for path in sorted(place.glob(f"*{SUFFIX}")) if place is not None and place.is_dir() else []:
        with contextlib.suppress(OSError):  # another process may clear it at the same time
            data = path.read_bytes()
            whole = _parse(data)
            header = whole[1] if whole else {}
            found.append(
                Entry(path, header.get("kernel", ""), header.get("architecture", ""), len(data), whole is not None)
            )
    return found


def clear() -> int:
    """Removes every kernel that is kept, and what interrupted processes left; returns how many files that were."""
    place, removed = folder(), 0
    for path in list(place.iterdir()) if place is not None and place.is_dir() else []:
        if path.suffix in (SUFFIX, PART):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                removed += 1
    return removed


def describe(job: Job) -> str:
    """A kernel in a few words, for people: who makes it, and of which plan."""
    plan = " ".join(str(part) for part in job.key)
    return f"{job.factory.name.removesuffix('_source')}: {plan}"[:500]


def architecture(capability: tuple[int, int]) -> str:
    """The name that CUDA's tools have for a compute capability."""
    return f"sm_{capability[0]}{capability[1]}"


def _parse(data: bytes) -> tuple[Cubin, dict[str, str]] | None:
    if not data.startswith(MAGIC):
        return None
    line, newline, image = data[len(MAGIC) :].partition(b"\n")
    try:
        header = json.loads(line)
        cubin = Cubin(header["entry"], header["parameters"], image)
        whole = newline and header["length"] == len(image) and header["sha256"] == _hash(cubin)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return (cubin, header) if whole else None


def _hash(cubin: Cubin) -> str:
    return hashlib.sha256(f"{cubin.entry}\n{cubin.parameters}\n".encode() + cubin.image).hexdigest()


def _name(job: Job) -> str:
    what = [*job.factory, repr(job.key), job.capability, _environment()]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:40] + SUFFIX


@functools.cache
def _environment() -> list[str]:
    """What machine code depends on beside the job: who compiles it, from which sources, and for which driver."""
    versions = []
    for name in MADE_WITH:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} -")
    # Without this module, Numba's own CUDA target stands in for numba-cuda, whatever is installed.
    redirected = "_numba_cuda_redirector" in sys.modules
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return [*versions, python, f"redirected {redirected}", f"driver {driver.version()}", _sources()]


def _sources() -> str:
    """A hash of everything that takes part in writing kernels: this room."""
    total, room = hashlib.sha256(), Path(__file__).parent
    for path in sorted(room.rglob("*.py")):
        total.update(f"{path.relative_to(room).as_posix()}\n".encode())
        total.update(path.read_bytes())
    return total.hexdigest()
