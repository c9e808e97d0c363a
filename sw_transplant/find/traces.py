"""What a run leaves behind beside its output: random numbers drawn, attributes changed, tensors written to."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_OF_THE_MODULE = frozenset({"_parameters", "_buffers", "_modules", "training", "_non_persistent_buffers_set"})
_SIMPLE = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)
_DEPTH = 4


class Draws:
    """Whether random numbers were drawn from a global generator (PyTorch's, Python's, NumPy's) since it was made."""

    def __init__(self, devices: set[torch.device]) -> None:
        self._devices = sorted((device for device in devices if device.type == "cuda"), key=str)
        self._before = self._states()

    def _states(self) -> list[Any]:
        of_numpy = np.random.get_state(legacy=True)  # its keys are a copy
        states: list[Any] = [torch.random.get_rng_state(), random.getstate(), of_numpy]
        return states + [torch.cuda.get_rng_state(device) for device in self._devices]

    @property
    def any(self) -> bool:
        """Whether there were any."""
        return not all(_same(one, other) for one, other in zip(self._before, self._states(), strict=True))

    def undo(self) -> None:
        """Puts the generators back to where they were, if they have moved."""
        if not self.any:
            return
        of_torch, of_python, of_numpy, *of_devices = self._before
        torch.random.set_rng_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for device, state in zip(self._devices, of_devices, strict=True):
            torch.cuda.set_rng_state(state, device)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple) and one and isinstance(one[0], str):  # NumPy's
        return one[2:] == other[2:] and np.array_equal(one[1], other[1])
    return bool(one == other)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[Draws]:
    """Runs foreign code: whatever it draws at random, the global generators are afterwards where they were."""
    draws = Draws({parameter.device for parameter in module.parameters()})
    try:
        yield draws
    finally:
        draws.undo()


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Everything but tensors and modes that a module and its parts hold, and that their classes hold; to be compared.

    Objects count as they are at this moment: lists by their items, generators by their state, others by their own
    attributes.
    """
    held: dict[str, Any] = {}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in _OF_THE_MODULE:
                held[f"{path}.{name}"] = _fingerprint(value)
        for kind in type(part).__mro__:
            if kind.__module__.partition(".")[0] != "torch" and kind is not object:
                for name, value in vars(kind).items():
                    if isinstance(value, (*_SIMPLE, list, dict, set)) and not name.startswith("__"):
                        held[f"{kind.__qualname__}.{name}"] = _fingerprint(value)
    return held


def _fingerprint(value: Any, depth: int = _DEPTH) -> Any:
    if isinstance(value, _SIMPLE):
        return type(value), repr(value)
    if isinstance(value, Tensor):
        return "tensor", id(value), None if value.is_inference() else value._version
    if isinstance(value, random.Random):
        return "generator", hash(value.getstate())
    if isinstance(value, torch.Generator):
        return "generator", bytes(value.get_state().numpy())
    if isinstance(value, np.random.Generator):
        return "generator", repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return "generator", repr(value.get_state())
    if isinstance(value, np.ndarray):
        return "array", value.tobytes()
    if depth == 0 or isinstance(value, (nn.Module, type)):
        return "object", id(value)
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_fingerprint(item, depth - 1) for item in value)
    if isinstance(value, (set, frozenset)):
        return type(value), len(value)
    if isinstance(value, dict):
        items = [(_fingerprint(key, 0), _fingerprint(item, depth - 1)) for key, item in value.items()]
        return type(value), tuple(items)
    own = getattr(value, "__dict__", None)
    own = own if isinstance(own, dict) and not callable(value) else {}
    return (
        "object",
        id(value),
        _counts(value),
        tuple((name, _fingerprint(item, depth - 1)) for name, item in own.items()),
    )


def _counts(value: Any) -> str:
    """Where a built-in iterator stands: itertools.count and its like say so in their representation."""
    return repr(value) if type(value).__module__ == "itertools" else ""


class Tensors:
    """The parameters and buffers of a module as they are now, to tell later which of them was written to."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._held = {name: (tensor, tensor._version, tensor.detach().clone()) for name, tensor in _tensors(module)}

    def written(self) -> list[str]:
        """The names of those that are another tensor or have another value or count of changes."""
        return [name for name, tensor in _tensors(self._module) if not self._is_what_it_was(name, tensor)]

    def _is_what_it_was(self, name: str, tensor: Tensor) -> bool:
        before, version, values = self._held.get(name, (None, 0, tensor))
        # A write through .data is not counted.
        return before is tensor and version == tensor._version and identical(tensor, values)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def identical(one: Tensor, other: Tensor) -> bool:
    """The same shape and the same values, NaN where NaN is."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def told(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
