"""What a call of a layer does: its plan (docs/design/caching.md).

A plan is made of the layer's parameters for maps of one size: the form that was chosen, the tensors that it multiplies
with, and what is added. Making one takes longer than a small convolution; hence eval keeps it while nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sw_transplant.forms import FORMS, Biases, Call
from sw_transplant.forms.assembled import join_extents, shorten
from sw_transplant.forms.dispatch import (
    Conditions,
    Decision,
    Job,
    choose_form,
)
from sw_transplant.geometry import Extent, Padding, Size
from sw_transplant.layers.folding import total
from sw_transplant.layers.placed_tiles import PlacedTiles
from sw_transplant.layers.recompute import Recompute, computed_twice, normalise
from sw_transplant.ops.depthwise import Step, is_channels_last, layout_of


class Layer(Protocol):
    """What a plan is made of: a :class:`ShiftwiseConv2d`."""

    stride: Size
    recompute: Recompute
    _takes_shortcuts: bool

    @property
    def form(self) -> str: ...
    @property
    def nonfinite(self) -> str: ...
    @property
    def guarantee(self) -> tuple[str, ...]: ...
    @property
    def kernel_size(self) -> Size: ...
    @property
    def padding(self) -> Size | Padding: ...
    def parts(self) -> Sequence[PlacedTiles]: ...
    def extent_on(self, branch: PlacedTiles, size: Size) -> Extent: ...
    def out_size(self, size: Size) -> Size: ...


@dataclass(eq=False)
class Plan:
    """What runs on maps of one size.

    Attributes:
        decision: the form, and why.
        prepared: what the form made of the branches.
        biases: what is added to each output.
        norms: the BatchNorms of the last outputs, where batch statistics normalise them.
        call: sizes, stride, dtype.
        turns: maps are turned to channels_last first: the layer is laid out so.
        casts: maps of another dtype are cast: autocast is on.
        twice: which outputs are computed again in the backward pass.
        trained: the kernels get a gradient, so that the plan serves a single call.
        beside: branches that pass the map on and see it before it is cast: autocast adds them in the wider dtype.
    """

    decision: Decision
    prepared: Any
    biases: Biases
    norms: list[nn.Module]
    call: Call
    turns: bool
    casts: bool
    twice: list[bool]
    trained: bool
    beside: list[PlacedTiles]

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of all outputs for a map ``(B, C, H, W)``, each through its BatchNorm, laid out as the map is."""
        if self.turns:
            x = x.contiguous(memory_format=torch.channels_last)
        layout, uncast = layout_of(x), x
        if self.casts and x.dtype is not self.call.dtype:
            x = x.to(self.call.dtype)
        maps = FORMS[self.decision.form].execute(x, self.prepared, self.biases, self.call)
        for k, norm in enumerate(self.norms, start=len(maps) - len(self.norms)):
            maps[k] = self._normalised(k, norm, maps[k], x)
        y = maps[0] if len(maps) == 1 else reduce(add, maps)
        for branch in self.beside:
            y = y + (uncast if branch.bn is None else branch.bn(uncast))
        return y.contiguous(memory_format=layout)

    def shortened(self, like: Tensor) -> Step | None:
        """What does the same, bit for bit, with maps of this size, these strides and this dtype, with little Python.

        Between two small convolutions on a CPU, the Python of a call costs as much as they do. None where it is known
        only with the call.
        """
        if self.decision.form != "assembled" or self.norms or self.casts or like.device.type != "cpu":
            return None
        given = like.contiguous(memory_format=torch.channels_last) if self.turns else like
        step = shorten(given, self.prepared[0], self.biases[0], self.call)
        if step is None or given is like:
            return step
        run, turned = step.run, torch.channels_last
        return Step(lambda x: run(x.contiguous(memory_format=turned)), step.dispatched)

    def _normalised(self, k: int, norm: nn.Module, responses: Tensor, x: Tensor) -> Tensor:
        if not self.twice[k] or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return norm(responses)  # type: ignore[no-any-return]
        one, given = slice(k, k + 1), x.detach()
        execute = FORMS[self.decision.form].execute
        return normalise(
            norm, responses, lambda: execute(given, self.prepared[one], self.biases[one], self.call)[0].to(responses)
        )


@dataclass(frozen=True)
class Outline:
    """What of a plan does not depend on values of parameters: a training step makes its tensors anew, and no more.

    Attributes:
        decision, call, turns, casts, twice, trained: as in :class:`Plan`.
        order: the branches, linear ones first, without those of ``beside``.
        beside: as in :class:`Plan`, their numbers.
        linear: how many of them are linear.
        origins: zeros (top, left) before the map, of each.
        dense: nothing but dense kernels is made of them.
        multiplied: each channel goes to several, so that no branch passes the map on as it is.
    """

    decision: Decision
    call: Call
    turns: bool
    casts: bool
    twice: list[bool]
    trained: bool
    order: list[int]
    beside: list[int]
    linear: int
    origins: list[Size]
    dense: bool
    multiplied: bool


def make_plan(layer: Layer, x: Tensor, given: Conditions) -> Plan:
    """The sum of all linear branches, then each branch that batch statistics normalise, in the form that is best.

    Args:
        layer: what the plan is for.
        x: a map ``(B, C, H, W)``; its size counts.
        given: the conditions of the call.

    Raises:
        ValueError: the map is too small for the kernels.
    """
    branches = layer.parts()
    return fill(outline(layer, branches, x, given), branches)


def outline(layer: Layer, branches: Sequence[PlacedTiles], x: Tensor, given: Conditions) -> Outline:
    """The outline of the plan for a map; arguments as of :func:`make_plan`, and the parts of the layer."""
    size = (x.shape[2], x.shape[3])
    out_size = layer.out_size(size)
    if min(out_size) < 1:
        raise ValueError(
            f"ShiftwiseConv2d: map {size[0]}x{size[1]} with padding {layer.padding} is smaller than the kernel "
            f"{layer.kernel_size}; expected a map that gives at least one output"
        )
    dtype, turns = branches[0].bank.dtype, is_channels_last(branches[0].bank)
    if turns:
        given = given._replace(channels_last=True)
    casts = given.autocast is not None and dtype is not torch.float64  # which autocast leaves alone
    call = Call(size, out_size, layer.stride, given.autocast if casts else dtype)  # type: ignore[arg-type]
    wider = casts and x.dtype is not call.dtype and not all(branch.is_identity for branch in branches)
    beside = [i for i, branch in enumerate(branches) if wider and branch.is_identity]
    order = [i for i in range(len(branches)) if i not in beside]
    order.sort(key=lambda i: not branches[i].folds)  # linear ones first
    linear = sum(branches[i].folds for i in order)
    extents = [layer.extent_on(branches[i], size) for i in order]
    edges = [[extent] * len(branches[i].index) for extent, i in zip(extents, order, strict=True)]
    outputs = [reduce(add, edges[:linear])] if linear else []
    kernels = [[extent for extent, _ in join_extents(entry)] for entry in outputs + edges[linear:]]
    trained = torch.is_grad_enabled() and any(branch.trains_kernel for branch in branches)
    channels = (x.shape[1], branches[0].bank.shape[0])
    job, local = Job(channels, call, kernels, trained), layer.nonfinite == "local"
    decision = choose_form(layer.form, job, given, local=local, guarantee=layer.guarantee)
    recompute = "none" if decision.form == "shift" else layer.recompute
    return Outline(
        decision,
        call,
        turns,
        casts,
        computed_twice(recompute, [sum(extent.taps for extent in entry) for entry in kernels]),
        trained,
        order,
        beside,
        linear,
        [extent.origin for extent in extents],
        layer.form != "shift",  # which "auto" never takes
        channels[0] != channels[1],
    )


def fill(given: Outline, branches: Sequence[PlacedTiles]) -> Plan:
    """The plan of an outline, from the parameters as they are now."""
    beside, linear, call = [branches[i] for i in given.beside], given.linear, given.call
    branches = [branches[i] for i in given.order]
    parts = [
        branch.placed(origin, fold=branch.folds, dense=given.dense)
        for branch, origin in zip(branches, given.origins, strict=True)
    ]
    if given.multiplied:
        parts = [[replace(placed, identity=False) for placed in part] for part in parts]
    outputs = [reduce(add, parts[:linear])] if linear else []
    outputs += parts[linear:]
    biases: list[Tensor | None] = [branch.bias for branch in branches[linear:]]
    if linear:
        biases.insert(0, total([branch.folded_bias() for branch in branches[:linear]], branches[0].bank.dtype))
    return Plan(
        given.decision,
        FORMS[given.decision.form].prepare(outputs, call),
        [bias if bias is None or bias.dtype is call.dtype else bias.to(call.dtype) for bias in biases],
        [branch.bn for branch in branches[linear:]],  # type: ignore[misc]
        call,
        given.turns,
        given.casts,
        given.twice,
        given.trained,
        beside,
    )
