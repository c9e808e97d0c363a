"""What a frozen layer runs: plans whose tensors are buffers, made once, for compiled and captured calls too.

Compiled code makes the plan of a call from the parameters, so that it never runs with old ones. A frozen layer says
that its parameters stay as they are: what compiled code and CUDA graphs find in its buffers they take as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from sw_transplant.cuda.answers import Passing
from sw_transplant.forms.dispatch import cast_of, conditions
from sw_transplant.layers.plan import Plan, make_plan
from sw_transplant.layers.planner import Kept
from sw_transplant.layers.watch import Watch
from sw_transplant.ops.tracing import is_transformed

PREFIX = "frozen_"


class Frozen:
    """The plans of a frozen layer, one for each size of the map, device, stride and dtype of autocast.

    A plan is made by the first call that is neither compiled nor captured, and again where the parameters have changed
    by then. One that was decided while an answer about the device was passing, as for want of memory, is not kept. A
    compiled call of a size that has no plan makes its own, as without freezing. Copies and pickles of a layer stay
    frozen, without plans: the buffers are not saved.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Kept] = {}

    def __call__(self, layer: Any, x: Tensor) -> Callable[[Tensor], Tensor]:
        """What the layer does with a map ``(B, C, H, W)``.

        Raises:
            RuntimeError: a gradient of the parameters is wanted.
            ValueError: the map is too small for the kernels.
        """
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in layer.parameters()):
            raise RuntimeError(
                "a frozen ShiftwiseConv2d gives its parameters no gradient; got a call with gradients enabled and "
                "parameters that require them, expected torch.no_grad() or torch.inference_mode(); or undo it: "
                "sw_transplant.unfreeze(model)"
            )
        given = conditions(x)
        key: tuple[Any, ...] = (x.shape[2], x.shape[3], given.device, cast_of(x), layer.stride)
        key += ("deterministic",) if given.deterministic else ()
        kept = self._kept.get(key)
        if torch.compiler.is_compiling() or is_transformed() or (x.is_cuda and _is_capturing()):
            return make_plan(layer, x, given) if kept is None or given.transformed else kept.plan
        if kept is None or not kept.unchanged():
            kept = self._make(layer, x, key)
        return kept.serve(x)

    def _make(self, layer: Any, x: Tensor, key: tuple[Any, ...]) -> Kept:
        self._drop(layer, key)
        said = Passing.said
        with torch.inference_mode(False), torch.no_grad():
            # Of a copy, so that nothing in the plan is written to with the layer.
            plan = make_plan(copy.deepcopy(layer).requires_grad_(False), x, conditions(x))
            if Passing.said != said:  # it follows from what passes: for this call only
                layer._planner.decision = plan.decision
                return Kept(key, plan, None)
            for number, tensor in enumerate(_tensors(plan)):
                layer.register_buffer(f"{_stem(key)}_{number}", tensor, persistent=False)
        if x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()  # calls on other streams read it, too
        layer._planner.decision = plan.decision
        watch = None
        with suppress(RuntimeError):  # tensors whose changes nobody counts
            watch = Watch(layer)
        self._kept[key] = Kept(key, plan, watch)
        return self._kept[key]

    def forget(self, layer: nn.Module) -> None:
        """Drops all plans, and the buffers that hold them."""
        for key in list(self._kept):
            self._drop(layer, key)

    def _drop(self, layer: nn.Module, key: tuple[Any, ...]) -> None:
        self._kept.pop(key, None)
        stem = f"{_stem(key)}_"
        for name in [name for name in layer._buffers if name.startswith(stem)]:
            delattr(layer, name)

    def __len__(self) -> int:
        return len(self._kept)

    def __bool__(self) -> bool:
        return True

    def __reduce__(self) -> tuple[Callable[[], Frozen], tuple[()]]:
        return Frozen, ()


def without_buffers(state: dict[str, Any]) -> dict[str, Any]:
    """What is copied and pickled of a layer: all but the buffers of its plans."""
    buffers = {name: value for name, value in state["_buffers"].items() if not name.startswith(PREFIX)}
    saved = {name for name in state["_non_persistent_buffers_set"] if not name.startswith(PREFIX)}
    return {**state, "_buffers": buffers, "_non_persistent_buffers_set": saved}


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _stem(key: tuple[Any, ...]) -> str:
    """The beginning of the names of a plan's buffers."""
    return PREFIX + "_".join(str(part).replace("torch.", "").replace(" ", "") for part in key).replace(".", "_")


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a plan, each once."""
    found: dict[int, Tensor] = {}
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Tensor):
            found.setdefault(id(each), each)
        elif isinstance(each, Plan):
            waiting += [each.prepared, each.biases]
        elif isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list | tuple):
            waiting += each
        elif type(each).__module__.startswith("sw_transplant.") and hasattr(each, "__dict__"):
            waiting += vars(each).values()
    return iter(found.values())
