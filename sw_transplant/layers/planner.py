"""Who gives a layer the plan of each call, and how long it is kept (docs/design/caching.md)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from sw_transplant.cuda.answers import Passing
from sw_transplant.forms.dispatch import FEW_IMAGES, Decision, cast_of, conditions, matmul_is_coarser
from sw_transplant.layers.plan import Layer, Outline, Plan, fill, make_plan, outline
from sw_transplant.layers.shortcut import Shortcut, shortcut
from sw_transplant.layers.watch import Watch
from sw_transplant.ops.depthwise import Step, runs_as_it_is
from sw_transplant.ops.tracing import is_transformed


class Planner:
    """Gives a layer the plan of each call, and keeps the last one where it may serve again.

    Attributes:
        decision: of the last call that was not compiled, captured or transformed; None before it.
        shortcut: what serves calls that are just like the last one, of layers that take it; None for none.
    """

    def __init__(self) -> None:
        self.decision: Decision | None = None
        self.shortcut: Shortcut | None = None
        self._kept: Kept | None = None
        self._outline: tuple[tuple[Any, ...], Outline, Watch] | None = None

    def __call__(self, layer: Layer, x: Tensor) -> Callable[[Tensor], Tensor]:
        """What the layer does with a map ``(B, C, H, W)``.

        Raises:
            ValueError: the map is too small for the kernels.
        """
        if torch.compiler.is_compiling():
            return self._anew(layer, x)
        if is_transformed():
            return self._apart(layer, x)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._anew(layer, x)
        return self._kept_or_anew(layer, x)

    def forget(self) -> None:
        """Drops the plan that is kept, and the outline."""
        self._kept = self._outline = self.shortcut = None

    @staticmethod
    def _anew(layer: Layer, x: Tensor) -> Plan:
        """Compiled or captured: the plan's tensors are made in the graph, from the weights of the time when it runs."""
        return make_plan(layer, x, conditions(x))

    def _apart(self, layer: Layer, x: Tensor) -> Plan:
        """Under torch.func: tensors that stand for others must not stay behind in a plan, nor be read from one."""
        self.forget()
        return self._anew(layer, x)

    def _kept_or_anew(self, layer: Layer, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Eager: the plan that is kept, where nothing that went into it has changed."""
        kept, key = self._kept, (layer.stride, *_key(x))
        if kept is not None and kept.key == key and kept.unchanged():
            return self._served(layer, kept, x)
        self._kept, self.shortcut, said = None, None, Passing.said
        plan = self._from_outline(layer, x, key)
        self.decision = plan.decision
        if not plan.norms and not plan.trained and Passing.said == said:
            with suppress(RuntimeError):  # tensors whose changes nobody counts: no plan is kept
                watch = Watch(layer)  # type: ignore[arg-type]
                if not (torch.is_grad_enabled() and watch.wants_gradients()):
                    self._kept = Kept(key, plan, watch)
        return plan

    def _served(self, layer: Layer, kept: Kept, x: Tensor) -> Callable[[Tensor], Tensor]:
        step = kept.step(x)
        if step is None:
            return kept.plan
        if layer._takes_shortcuts and kept.watch is not None:
            self.shortcut = shortcut(layer, x, step, kept.watch)  # type: ignore[arg-type]
        return step.run

    def _from_outline(self, layer: Layer, x: Tensor, key: tuple[Any, ...]) -> Plan:
        """A plan from the parameters as they are, by the outline of the call before if the layer has the same parts."""
        key, branches = (*key, torch.is_grad_enabled(), layer.recompute), layer.parts()
        known, self._outline = self._outline, None
        if known is None or known[0] != key or not known[2].same_parts():
            said = Passing.said
            found = outline(layer, branches, x, conditions(x))
            if found.trained and Passing.said == said:  # else the plan itself is kept, or what it follows from passes
                with suppress(RuntimeError):  # tensors without addresses
                    self._outline = key, found, Watch(layer)  # type: ignore[arg-type]
            return fill(found, branches)
        self._outline = known
        return fill(known[1], branches)

    def __reduce__(self) -> tuple[Callable[[], Planner], tuple[()]]:
        return Planner, ()  # copies and pickles start anew


class Kept:
    """A plan that served a call, for the calls after it."""

    def __init__(self, key: tuple[Any, ...], plan: Plan, watch: Watch | None) -> None:
        """watch: on the layer; None where nobody counts its changes."""
        self.key, self.plan, self.watch = key, plan, watch
        self._step: tuple[torch.Size, torch.dtype, Step | None] | None = None

    def unchanged(self) -> bool:
        """Whether the layer is still what the plan was made of."""
        return self.watch is None or self.watch.unchanged()

    def serve(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """The plan; for maps just like those of the call before, the shortest way through it."""
        step = self.step(x)
        return self.plan if step is None else step.run

    def step(self, x: Tensor) -> Step | None:
        """The shortest way through the plan; None for a call that has to take the plan itself."""
        if type(x) is not Tensor or not runs_as_it_is(x):
            return None
        known = self._step
        if known is None or known[0] != x.shape or known[1] is not x.dtype:
            self._step = known = (x.shape, x.dtype, self.plan.shortened(x))
        return known[2]


def _key(x: Tensor) -> tuple[Any, ...]:
    """What a plan depends on beside the layer: asked before every call, so only what is quick to ask."""
    shape, device = x.shape, x.device
    modes = (torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled())
    common = (shape[1:], x.stride(), shape[0] > FEW_IMAGES, device, cast_of(x), modes)
    if device.type != "cuda":
        return common
    # On another stream the plan's tensors may not be ready yet.
    return (*common, matmul_is_coarser(), torch.cuda.current_stream(device).cuda_stream)
