"""The proof of a site: original and candidate side by side, until one does what the other does not.

Reading a forward proposes what it computes; Python may decide otherwise at the next call. So a private copy of the
site and the module that would take its place run on the same small maps, in float64, with random weights: in eval and
in train mode, several times, with and without gradients, on large values, zeros and NaN. They must agree in all that a
caller can notice. What the original does beside that (draw random numbers, write to its input or to itself, count its
calls, switch gradients or autocast) no candidate does, so it is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sw_transplant.equivalence import lay_out
from sw_transplant.find.candidate import build
from sw_transplant.find.code import whole_numbers
from sw_transplant.find.match import Match
from sw_transplant.find.specimen import FEW, narrowed, private_copy
from sw_transplant.find.traces import told, undisturbed
from sw_transplant.find.trial import Case, Run
from sw_transplant.geometry import BranchGeometry, Size
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Relative error up to which two results are the same, by what the site can be run in; float64 if it can."""
LARGE = 1e6
"""What maps are multiplied with to see whether large values are treated differently."""

WIDE = (24, 40)
"""Size of a map that is larger than the others, times the stride."""
LARGEST = 64
"""Height and width up to which sizes are tried because the code mentions them."""


def difference(site: nn.Module, match: Match) -> str | None:
    """What the site does differently from the module that would be built for it, in words; None for nothing.

    Args:
        site: a module; it is copied, and neither run nor changed.
        match: how it is said to be made.
    """
    tensors = [*site.parameters(), *site.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        return "it has no values (meta device), so that it cannot be tried"
    with undisturbed(site):
        reason = ""
        for dtype in dict.fromkeys((torch.float64, next(site.parameters()).dtype)):
            try:
                return _first_difference(private_copy(site, dtype), match, BOUNDS.get(dtype, 1e-1))
            except _NotRunError as error:
                reason = reason or f"it cannot be tried: {error}"
            except Exception as error:  # of foreign code
                return f"it cannot be tried: {told(error)}"
        return reason


class _NotRunError(Exception):
    """A site does not run at all on the maps that it is tried on."""


def _first_difference(original: nn.Module, match: Match, bound: float) -> str | None:
    """Tries a copy on all cases; where channels are alike, on most of them with few channels."""
    norms = [module for module in original.modules() if isinstance(module, _BatchNorm)]
    whole, *cases = _cases(match, folds=all(norm.running_mean is not None for norm in norms))
    cases += _mentioned_sizes(original, cases[0])
    narrow = narrowed(original, match.in_channels)
    if narrow is not None:
        few = replace(match, in_channels=FEW, out_channels=FEW * match.out_channels // match.in_channels)
        try:
            return _tried(narrow, few, [whole, *cases], bound) or _tried(original, match, cases[:1], bound)
        except _NotRunError:  # it asks for the number of channels that it was made with
            pass
    return _tried(original, match, [whole, *cases], bound)


def _tried(original: nn.Module, match: Match, cases: Sequence[Case], bound: float) -> str | None:
    """The first difference from the module that would be built for it; None for none."""
    candidate = build(copy.deepcopy(original), match, form="assembled")
    for number, case in enumerate(cases):
        for module in (original, candidate):
            if case.mode is not None:
                module.train(case.mode)
        x = _map(case, original, match, number)
        expected, got = Run(original, x, case), Run(candidate, x, case)
        if expected.beside:
            return f"{case.what}, {expected.beside}"
        if expected.error is not None and number == 0:
            raise _NotRunError(expected.failure)
        if type(expected.error) is not type(got.error):
            failing = f"it fails: {expected.failure}" if expected.error else f"its replacement fails: {got.failure}"
            return f"{case.what}, {failing}"
        if expected.error is not None:
            continue
        if found := _unlike(expected, got, match, case, bound) or _unlike_state(original, candidate, match, bound):
            return f"{case.what}, {found}"
    return None


def _cases(match: Match, folds: bool) -> list[Case]:
    """In this order: what can be seen at a glance first. Only the first map is large enough to meet every tap."""
    whole, small, other = _sizes(match.geometries, match.stride)
    wide = (max(WIDE[0] * match.stride[0], small[0]), max(WIDE[1] * match.stride[1], small[1]))
    cases = [
        Case("in the mode it is in", None, whole),
        Case("in eval mode", False, small),
        Case("in eval mode, a second time", False, small, of_input=False),
        Case("in train mode", True, small),
        Case("in train mode, a second time", True, other),
        Case("in train mode on one map, without gradients", True, small, images=1, grads=False, of_input=False),
        Case("in eval mode on another map", False, other, images=1),
        Case("in eval mode on a wide map", False, wide, images=3, grads=False, of_input=False),
        Case("on large values", False, small, factor=LARGE),
        Case("on negative large values", False, small, factor=-LARGE, grads=False),
        Case("on zeros", False, small, factor=0.0),
        Case("in eval mode, once more", False, small),
    ]
    if folds:  # else one NaN is in the statistics of its channel, and so everywhere
        cases.append(Case("where one value is NaN", False, small, nan=True, grads=False, of_input=False))
    return cases


def _mentioned_sizes(site: nn.Module, like: Case) -> list[Case]:
    """Maps as high, or as wide, as a number in the code says, and one more: where it may take another way."""
    numbers = {
        number
        for part in site.modules()
        if type(part).__module__.partition(".")[0] != "torch"
        for number in whole_numbers(part)
    }
    height, width = like.size
    cases = []
    for number in sorted(each + more for each in numbers for more in (0, 1)):
        for size in ((number, width), (height, number)):
            if like.size[0] <= size[0] <= LARGEST and like.size[1] <= size[1] <= LARGEST:
                what = f"in eval mode on a map of {size[0]} x {size[1]}"
                cases.append(Case(what, False, size, images=1, grads=False, of_input=False))
    return cases


def _sizes(geometries: Sequence[BranchGeometry], stride: Size) -> tuple[Size, Size, Size]:
    """A map on which every tap meets a value, and two small ones, of different height and width."""
    whole, small = [], []
    for axis in range(2):
        least = most = 3
        for geometry in geometries:
            reach = geometry.reach[axis]
            before, after = (0, 0) if geometry.padding == "same" else geometry.padding[2 * axis : 2 * axis + 2]
            if geometry.padding == "same":
                before = after = reach // 2
            least = max(least, reach + 1 - before - after + 2 * stride[axis])
            most = max(most, reach + 1 - min(before, after) + stride[axis])
        small.append(max(least, 5))
        whole.append(max(most, least))
    return (whole[0], whole[1] + 1), (small[0], small[1] + 1), (small[0] + 3, small[1] + 1)


def _map(case: Case, module: nn.Module, match: Match, number: int) -> Tensor:
    like = next(module.parameters())
    generator = torch.Generator().manual_seed(number)
    shape = (case.images, match.in_channels, *case.size)
    x = case.factor * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    if case.nan:
        x[0, :, case.size[0] // 2, case.size[1] // 2] = float("nan")
    return x.to(like.device, like.dtype)


def _unlike(expected: Run, got: Run, match: Match, case: Case, bound: float) -> str | None:
    """The first thing in which two runs differ."""
    one, other = expected.output, got.output
    if type(one) is not Tensor:
        return f"it returns {type(one).__name__}, not a tensor"
    if one.shape != other.shape:
        return f"its output has the shape {tuple(one.shape)}, not {tuple(other.shape)}"
    if one.dtype != other.dtype:
        return f"its output is {one.dtype}, not {other.dtype}"
    if one.requires_grad != other.requires_grad:
        return f"its output {'has a' if one.requires_grad else 'has no'} gradient"
    if case.nan:
        if not torch.equal(one.isnan(), _touched(expected.x.isnan(), match, one)):
            return "NaN does not spread as in a convolution"
        return None
    if not _close(other, one, bound):
        return "its output is another"
    pairs = {"the gradient of its input": (expected.x.grad, got.x.grad)}
    pairs |= {f"the gradient of {name}": pair for name, pair in _gradients(expected, got, match).items()}
    for name, (wanted, grad) in pairs.items():
        if wanted is None or grad is None:
            if wanted is not grad:
                return f"{name} is {'missing' if wanted is None else 'there'}"
        elif not _close(grad, wanted, bound):
            return f"{name} is another"
    return None


def _gradients(expected: Run, got: Run, match: Match) -> dict[str, tuple[Tensor | None, Any]]:
    """Gradients of the original's parameters, laid out where their values are, beside those of the candidate."""
    pairs: dict[str, tuple[Tensor | None, Any]] = {}
    for i, source in enumerate(match.branches):
        if source.weight is not None:
            dense = expected.grads[source.weight]
            tiles = None if dense is None else lay_out(dense, source.tile)[0]
            pairs[source.weight] = tiles, got.grads[f"branches.{i}.bank"]
        if source.bias is not None:
            pairs[source.bias] = expected.grads[source.bias], got.grads[f"branches.{i}.bias"]
        if source.bn is not None:
            prefix = f"branches.{i}.bn."
            for name in [name for name in got.grads if name.startswith(prefix)]:
                theirs = f"{source.bn}.{name.removeprefix(prefix)}"
                pairs[theirs] = expected.grads[theirs], got.grads[name]
    return pairs


def _unlike_state(original: nn.Module, candidate: ShiftwiseConv2d, match: Match, bound: float) -> str | None:
    """The first statistic of a BatchNorm that is another after both have run."""
    for branch, source in zip(candidate.branches, match.branches, strict=True):
        if source.bn is not None:
            for name, buffer in original.get_submodule(source.bn).named_buffers():
                if not _close(branch.bn.get_buffer(name), buffer, bound):  # type: ignore[union-attr, operator]
                    return f"{source.bn}.{name} is another"
    return None


def _close(got: Tensor, wanted: Tensor, bound: float) -> bool:
    if got.shape != wanted.shape:
        return False
    got, wanted = got.detach().double(), wanted.detach().double()
    # A gradient may be nothing but rounding: that of a bias before a BatchNorm.
    return bool((got - wanted).norm() <= bound * max(float(wanted.norm()), wanted.numel() ** 0.5))


def _touched(marked: Tensor, match: Match, output: Tensor) -> Tensor:
    """Where an output reads a marked position of the map through a tap of any branch."""
    touched = torch.zeros(output.shape, dtype=torch.bool, device=output.device)
    filters = match.out_channels // match.in_channels
    for geometry in match.geometries:
        ones = torch.ones(match.in_channels, 1, *geometry.kernel_size, dtype=output.dtype, device=output.device)
        top, bottom, left, right = geometry.resolve((marked.shape[2], marked.shape[3]), match.stride)
        padded = F.pad(marked.to(output.dtype), (left, right, top, bottom))
        reads = F.conv2d(padded, ones, None, match.stride, 0, geometry.dilation, match.in_channels)
        touched |= (reads > 0.5).repeat_interleave(filters, dim=1)
    return touched
