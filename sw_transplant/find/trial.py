"""One call of a module on a map, and everything that comes of it: output, gradients, and what it does beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from sw_transplant.find.traces import Tensors, attributes_of, identical, told, undisturbed
from sw_transplant.geometry import Size


class Case(NamedTuple):
    """One call.

    Attributes:
        what: for the message.
        mode: True for train mode, False for eval, None for the modes that the site is in.
        size: of the map.
        factor: of the values; 0 for zeros.
        images: in the batch.
        grads: whether gradients are recorded; else the call is made under ``no_grad``.
        of_input: whether the map requires a gradient.
        nan: one position is NaN.
    """

    what: str
    mode: bool | None
    size: Size
    factor: float = 1.0
    images: int = 2
    grads: bool = True
    of_input: bool = True
    nan: bool = False


class Run:
    """A call of a module on a copy of a map. The module keeps the statistics of its BatchNorms, and no gradients.

    Attributes:
        output: of the call.
        x: the map; its gradient with it.
        grads: of the parameters, by name.
        beside: what the call did beside computing an output, in words; empty for nothing.
        error: what it raised; None for nothing.
    """

    def __init__(self, module: nn.Module, x: Tensor, case: Case) -> None:
        self.output: Any = None
        self.error: Exception | None = None
        self.beside = ""
        self.x = x.clone().requires_grad_(case.of_input)
        for parameter in module.parameters():
            parameter.grad = None
        attributes, tensors = attributes_of(module), Tensors(module)
        given = self.x * 1 if case.of_input and case.grads else self.x  # what requires a gradient cannot be written to
        version = given._version
        with undisturbed(module) as draws, torch.set_grad_enabled(case.grads), _Contexts() as contexts:
            try:
                self.output = module(given)
            except Exception as error:  # of foreign code
                self.error = error
            drawn = draws.any
        if drawn:
            self.beside = "it draws random numbers"
        elif given._version != version or not identical(given, x):
            self.beside = "it writes to its input"
        elif contexts.switched:
            self.beside = f"it switches {contexts.switched} on or off"
        elif attributes_of(module) != attributes:
            self.beside = "it changes its attributes"
        elif written := _beside_statistics(module, tensors.written()):
            self.beside = f"it writes to {written[0]}"
        self._backward(module, case)
        self.grads = {name: parameter.grad for name, parameter in module.named_parameters()}

    def _backward(self, module: nn.Module, case: Case) -> None:
        y = self.output
        if not case.grads or not isinstance(y, Tensor) or not y.requires_grad:
            return
        weights = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64, device="cpu").view(y.shape)
        with undisturbed(module) as draws:
            try:
                y.backward(weights.to(y.device, y.dtype))
            except Exception as error:  # of foreign code
                self.error = error
            if draws.any:
                self.beside = self.beside or "it draws random numbers in its backward pass"

    @property
    def failure(self) -> str:
        """The error in a line; empty for none."""
        return "" if self.error is None else told(self.error)


def _beside_statistics(module: nn.Module, written: list[str]) -> list[str]:
    """Those of the tensors written to that are no statistics of a BatchNorm."""
    statistics = {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if isinstance(part, _BatchNorm)
        for name, _ in part.named_buffers(recurse=False)
    }
    return [name for name in written if name not in statistics]


class _Contexts(TorchFunctionMode):
    """Notes whether what runs inside turned gradients, autocast or inference mode on or off for itself."""

    def __init__(self) -> None:
        super().__init__()
        self._around = self._now()
        self.switched = ""

    def __enter__(self) -> Any:
        self._around = self._now()
        return super().__enter__()

    @staticmethod
    def _now() -> dict[str, bool]:
        return {
            "gradients": torch.is_grad_enabled(),
            "inference mode": torch.is_inference_mode_enabled(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "autocast of CUDA": torch.is_autocast_enabled("cuda"),
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for name, value in self._now().items():
            if value != self._around[name]:
                self.switched = self.switched or name
        return func(*args, **(kwargs or {}))
