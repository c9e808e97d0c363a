"""What a network is at one moment, and which of its numbers a converted network holds where."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sw_transplant import ShiftwiseConv2d
from sw_transplant.equivalence import lay_out

Read = Callable[[], Tensor | None]


# ---- random states


def seed_all(seed: int) -> None:
    """The same state for PyTorch, Python and NumPy."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed notes its caller's stack for each absent device
    random.seed(seed)
    np.random.seed(seed)


def random_states() -> dict[str, Any]:
    """The three states, by the name of the library."""
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "Python": random.getstate(),
        "NumPy": np.random.get_state()[1].tobytes() + bytes(np.random.get_state()[2]),
    }


# ---- a network as it was


def snapshot(net: nn.Module) -> dict[str, Any]:
    """All that must not change where a network is only read: modules, modes, attributes, tensors and their versions."""
    seen: dict[str, Any] = {}
    for path, module in net.named_modules():
        seen[f"module {path}"] = (id(module), type(module))
        for name, value in vars(module).items():
            seen[f"attribute {path}.{name}"] = _frozen(value)
    for name, tensor in (*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)):
        version = None if tensor.is_inference() else tensor._version
        seen[f"tensor {name}"] = (id(tensor), version, tensor.requires_grad, _bytes(tensor), type(tensor))
        seen[f"gradient of {name}"] = None if tensor.grad is None else _bytes(tensor.grad)
        seen[f"attributes of {name}"] = {key: _frozen(value) for key, value in vars(tensor).items()}
    return seen


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (id(value), value._version, _bytes(value))
    if isinstance(value, (bool, int, float, str, bytes, type(None), torch.dtype)):
        return value
    if isinstance(value, (list, tuple)):
        return [_frozen(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _frozen(one) for key, one in value.items()}
    if isinstance(value, random.Random):
        return value.getstate()
    return id(value)


def _bytes(tensor: Tensor) -> Any:
    if tensor.is_meta:
        return tuple(tensor.shape)
    with torch.no_grad():
        return tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The first thing that two snapshots do not agree on."""
    for key in {**before, **after}:
        if before.get(key) != after.get(key):
            return key
    return None


# ---- the same numbers in two networks


@dataclass(frozen=True)
class Number:
    """A tensor of the original and what holds it in the converted network; ``lay`` brings the first to the second."""

    name: str
    old: Tensor
    read: Read
    lay: Callable[[Tensor], Tensor]
    support: Tensor | None = None

    def new(self) -> Tensor | None:
        """The converted network's, without the taps beyond the kernel, which count nowhere; None if there is none."""
        held = self.read()
        return held if held is None or self.support is None else torch.where(self.support, held, 0)

    def new_gradient(self) -> Tensor | None:
        """Its gradient."""
        held = self.read()
        return None if held is None else held.grad


def _same(tensor: Tensor) -> Tensor:
    return tensor


def numbers(original: nn.Module, converted: nn.Module) -> Iterator[Number]:
    """Every parameter and buffer of the original that the converted network has, too; kernels by their banks."""
    layers = {path: module for path, module in converted.named_modules() if isinstance(module, ShiftwiseConv2d)}
    for path, layer in layers.items():
        yield from _of_site(path, original.get_submodule(path), layer)
    prefixes = tuple(f"{path}." if path else "" for path in layers)
    for name, tensor in (*original.named_parameters(), *original.named_buffers()):
        if not (prefixes and name.startswith(prefixes)):
            yield Number(name, tensor, _of(converted, name), _same)


def _of_site(path: str, site: nn.Module, layer: ShiftwiseConv2d) -> Iterator[Number]:
    for branch, source in zip(layer.branches, layer.match.branches, strict=True):
        if source.weight is not None:
            kernel = _tensor(site, source.weight)
            yield Number(_join(path, source.weight), kernel, _of(branch, "bank"), _lay(source.tile), branch.support)
        if source.bias is not None:
            yield Number(_join(path, source.bias), _tensor(site, source.bias), _of(branch, "bias"), _same)
        if source.bn is not None:
            norm = site.get_submodule(source.bn)
            for own, tensor in (*norm.named_parameters(), *norm.named_buffers()):
                yield Number(_join(path, f"{source.bn}.{own}"), tensor, _of(branch.bn, own), _same)


def buffers_lost(original: nn.Module, converted: nn.Module) -> dict[str, Tensor]:
    """Buffers of the original inside converted sites that nothing in the converted network stands for."""
    known = {number.name for number in numbers(original, converted)}
    return {name: tensor for name, tensor in original.named_buffers() if name not in known}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _tensor(module: nn.Module, path: str) -> Tensor:
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)


def _of(module: nn.Module, path: str) -> Read:
    def read() -> Tensor | None:
        parent, _, name = path.rpartition(".")
        return getattr(module.get_submodule(parent), name, None)

    return read


def _lay(tile: int) -> Callable[[Tensor], Tensor]:
    return lambda kernel: lay_out(kernel, tile)[0]


def attributes(net: nn.Module) -> dict[str, Any]:
    """The numbers, words and tensors that modules hold as plain attributes, and their modes."""
    held: dict[str, Any] = {}
    for path, module in net.named_modules():
        if isinstance(module, ShiftwiseConv2d):
            continue
        for name, value in vars(module).items():
            if name.startswith("_") or isinstance(value, (dict, set, nn.Module)):
                continue
            if isinstance(value, Tensor):
                held[f"{path}.{name}"] = value.detach().clone()
            elif isinstance(value, (bool, int, float, str)):
                held[f"{path}.{name}"] = value
    return held
