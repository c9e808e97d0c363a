"""Reading pickled checkpoints without running what is stored in them: a list of what may be in there, and no more."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

_REFUSED = re.compile(r"(?:GLOBAL|allowlisted via `add_safe_globals`, but got <class|unsupported class) '?([\w.]+)")
"""Where PyTorch's unpickler, or this file, names what it does not take."""

_NUMBERS = "biufc"
"""NumPy's kinds of booleans, integers and numbers with a point."""


def read_weights(path: Path) -> Any:
    """What a file of weights holds.

    Args:
        path: a ``.safetensors`` file, or a file of ``torch.save``.

    Raises:
        ValueError: there is no such file; it is damaged; or it holds something that is not on the list, by name.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file (expected an official checkpoint, .pth or .safetensors)")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(_allowed()):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle can fail in any way whatever: the bytes decide which error it is.
    except Exception as error:
        text = next(iter(str(error).splitlines()), "")
        name = _REFUSED.search(str(error))
        damage = "it is damaged, or holds objects other than tensors that are"
        what = f"it holds {name[1]}, which is" if name else damage
        raise ValueError(
            f"{path}: cannot be read as a checkpoint of plain weights: {what} not safe to load. "
            f"Download it again, or save its state_dict alone. ({type(error).__name__}: {text})"
        ) from error


def _allowed() -> list[type | tuple[Callable[..., Any], str]]:
    """Beside what PyTorch allows anyway: training arguments, and NumPy's numbers, which schedules of rates leave."""
    numbers = sorted({type(np.dtype(code)) for code in np.typecodes["All"] if np.dtype(code).kind in _NUMBERS}, key=str)
    # Files name the place that NumPy 1 or NumPy 2 kept it in.
    scalars = [(_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [argparse.Namespace, (_dtype, "numpy.dtype"), *scalars, *numbers]


def _dtype(name: Any, align: bool = False, copy: bool = True) -> np.dtype[Any]:
    """``numpy.dtype`` for numbers alone: others can hold objects."""
    dtype = np.dtype(str(name))
    if dtype.kind not in _NUMBERS:
        raise ValueError(f"unsupported class numpy.dtype of {name!r}")
    return dtype


def _scalar(dtype: Any, value: Any) -> np.generic:
    """One number from its bytes, as NumPy's own function that files name, which also takes objects."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in _NUMBERS or not isinstance(value, bytes):
        raise ValueError("unsupported class numpy.generic")
    return np.frombuffer(value, dtype, count=1)[0]  # type: ignore[no-any-return]
