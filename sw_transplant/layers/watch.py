"""Whether a module is still what it was: the same parts in the same modes, and no tensor written to or exchanged."""

from __future__ import annotations

from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class Steps:
    """``last`` is another object after each step of any optimizer: fused ones write without counting."""

    last = object()


def _note_step(*_: object) -> None:
    Steps.last = object()


register_optimizer_step_post_hook(_note_step)
_version, _training, _requires_grad = map(attrgetter, ("_version", "training", "requires_grad"))


class Watch:
    """Remembers the parameters, saved buffers and submodules of a module, for :meth:`unchanged` to compare.

    Asked before every call, hence built to be quick: lists that are compared without a loop in Python. It leaves out
    buffers that are not saved, because they follow from others. A write through ``tensor.data`` is not seen: PyTorch
    does not count it.

    Raises:
        RuntimeError: a tensor has no address or no count of its changes (fake, batched and inference tensors).
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        self._children: list[dict[str, Any]] = [each._modules for each in self._modules]
        self._modes = list(map(_training, self._modules))
        self._counts = list(map(len, self._children))
        slots = [
            (held, name)
            for each in self._modules
            for held in (each._modules, each._parameters, each._buffers)
            for name in held
            if name not in each._non_persistent_buffers_set
        ]
        self._holders, self._names = [held for held, _ in slots], [name for _, name in slots]
        self._held = [held[name] for held, name in slots]  # type: ignore[index]
        self._tensors = [value for value in self._held if isinstance(value, Tensor)]
        self._versions = list(map(_version, self._tensors))
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._wanting = list(map(_requires_grad, self._tensors))
        self.step = Steps.last
        # These keep the storages alive: an address cannot come to mean another tensor.
        self._aliases = [tensor.detach() for tensor in self._tensors]

    def same_parts(self) -> bool:
        """Whether the parts are the same, in the same modes, with the same tensors; these may have other values."""
        return (
            all(map(is_, map(dict.get, self._holders, self._names), self._held))  # type: ignore[arg-type]
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(_requires_grad, self._tensors)) == self._wanting
            and list(map(_training, self._modules)) == self._modes
            and list(map(len, self._children)) == self._counts
        )

    def unchanged(self) -> bool:
        """Whether nothing has changed, and no gradient is wanted now: the same tensors give the same results."""
        return (
            all(map(is_, map(dict.get, self._holders, self._names), self._held))  # type: ignore[arg-type]
            and Steps.last is self.step
            and list(map(_version, self._tensors)) == self._versions
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(_training, self._modules)) == self._modes
            and list(map(len, self._children)) == self._counts
            and not (torch.is_grad_enabled() and self.wants_gradients())
        )

    def wants_gradients(self) -> bool:
        """Whether a tensor requires a gradient."""
        return any(tensor.requires_grad for tensor in self._tensors)
