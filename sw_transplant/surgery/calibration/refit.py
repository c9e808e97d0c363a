"""Refitting the linear layers that follow a module, so that the block as a whole gives what the original's gave.

What a depthwise module cannot give any more, a layer that mixes channels can often make up for: the norm and the
pointwise layers of a block read all channels. Each linear layer (``nn.Linear``, or a 1 x 1 ``nn.Conv2d``) that runs
after the module inside of its block is solved for in turn, in closed form, with a ridge towards its weights that is
chosen by images left out of the solution. The last one aims at the block's output, which also holds what the blocks
before got wrong; the others at what they gave in the original.

How a block's output follows from its last linear layer is not read but probed: the block runs with that layer's output
replaced by zeros, ones and noise. Where the output is not that times a factor per channel, plus something, it is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.surgery.calibration.images import Images
from sw_transplant.surgery.calibration.moments import computed_in
from sw_transplant.surgery.calibration.responses import Ask, Seen, run_pairs, visits, watch

_RIDGES = (1e-2, 1e-1, 1.0, 10.0, math.inf)
_FOLDS = 4
"""Few images say little of some hundred inputs: the ridge is the one that does best on a quarter left out."""

_MATCHES = 1e-3
"""Of what the probe says of the noise, relative."""


@dataclass(frozen=True)
class Refitted:
    """What was done after a module.

    Attributes:
        path: of the linear layer, or of the block where nothing was.
        before, after: squared error of what it aims at, relative to the target's deviations from its mean.
        reason: why it was left as it is; empty where it was refitted.
        ridge: that was chosen, relative to the mean square of the layer's input.
    """

    path: str
    before: float = 0.0
    after: float = 0.0
    reason: str = ""
    ridge: float = 0.0

    def __str__(self) -> str:
        return f"{self.path}: {self.reason or f'{self.before:.1%} to {self.after:.1%}'}"


def refit_after(original: nn.Module, converted: nn.Module, path: str, images: Images) -> list[Refitted]:
    """Refits the linear layers behind a module, in place in ``converted``.

    Args:
        original: the network as it was.
        converted: the network converted so far, the module in its place.
        path: of the module.
        images: calibration images.

    Returns:
        What was refitted, and what was not and why.
    """
    block, lines = _followers(converted, path, images)
    if not lines:
        return [Refitted(block, reason="no linear layer follows the module in its block")]
    done = []
    for number, line in enumerate(lines):
        try:
            factor = _probe(converted, block, line, images) if number + 1 == len(lines) else None
        except _UnsuitableError as error:
            done.append(Refitted(line, reason=str(error)))
            factor = None
        done.append(_refit(original, converted, block, line, factor, images))
    return done


def _followers(model: nn.Module, path: str, images: Images) -> tuple[str, list[str]]:
    """The smallest module around a path in which linear layers run after it, and these, in order."""
    block = path
    while block:
        block = block.rpartition(".")[0]
        inside = {
            name: module
            for name, module in model.named_modules()
            if name.startswith(f"{block}." if block else "")
            and (_is_linear(module) or isinstance(module, ShiftwiseConv2d))
        }
        order = sorted((visit.rank, name) for name, visit in visits(model, images, inside).items() if visit.calls == 1)
        names = [name for _, name in order]
        if path not in names:
            return block, []
        lines = []
        for name in names[names.index(path) + 1 :]:
            if isinstance(inside[name], ShiftwiseConv2d):
                break
            lines.append(name)
        if lines or any(name != path and isinstance(inside[name], ShiftwiseConv2d) for name in names):
            return block, lines if block else []
    return block, []


def _is_linear(module: nn.Module) -> bool:
    if type(module) is nn.Linear:
        return True
    return (
        type(module) is nn.Conv2d
        and (module.kernel_size, module.stride, module.groups) == ((1, 1), (1, 1), 1)
        and module.padding in ((0, 0), 0, "same", "valid")
    )


class _UnsuitableError(Exception):
    """The output of a block does not follow from its last linear layer in a way that is solved for here."""


def _probe(model: nn.Module, block: str, line: str, images: Images) -> Tensor:
    """What the block multiplies each output channel of the layer with before it adds it."""
    layer, around = model.get_submodule(line), model.get_submodule(block)
    replaced: list[Callable[[Tensor], Tensor]] = []
    hook = layer.register_forward_hook(lambda _, __, output: replaced[-1](output))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_width(layer), generator=generator)
    trials: list[Callable[[Tensor], Tensor]] = [
        torch.zeros_like,
        torch.ones_like,
        lambda y: torch.zeros_like(y) + (noise.to(y) if isinstance(layer, nn.Linear) else noise.to(y)[:, None, None]),
    ]
    results = []
    try:
        for trial in trials:
            replaced.append(trial)
            seen: Seen = {}
            with torch.no_grad(), watch(model, {"block": (around, "output")}, seen, ends=not images.is_function) as run:
                run(next(images.runs()))
            results.append(seen["block"][0])
    finally:
        hook.remove()
    epsilon = torch.finfo(results[0].dtype).eps
    zero, one, other = (computed_in(each).double() for each in results)
    axis = 1 if zero.dim() == 4 and zero.shape[1] == len(noise) else zero.dim() - 1
    if zero.shape[axis] != len(noise):
        raise _UnsuitableError(f"the block gives {tuple(zero.shape)}, not the {len(noise)} channels of its last layer")
    factor, check = ((each - zero).movedim(axis, -1).flatten(0, -2) for each in (one, other))
    mean = factor.mean(0)
    expected = mean * noise.to(mean)
    rounding, size = 4 * epsilon * _rms(zero), _rms(expected)
    if not rounding < 0.1 * size:
        raise _UnsuitableError("the block adds so little of its last linear layer's output that rounding hides it")
    if not _rms(check - expected) <= _MATCHES * size + rounding:
        raise _UnsuitableError("the block does more with its last linear layer's output than to scale and to add it")
    return mean


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _width(layer: nn.Module) -> int:
    return layer.weight.shape[0]  # type: ignore[return-value, union-attr, index]


def _refit(
    original: nn.Module,
    converted: nn.Module,
    block: str,
    line: str,
    factor: Tensor | None,
    images: Images,
) -> Refitted:
    layer: Any = converted.get_submodule(line)
    if layer.bias is None:
        return Refitted(line, reason="it has no bias, which takes up what the means leave over")
    folds: list[dict[str, Tensor]] = [{} for _ in range(_FOLDS)]
    images_seen = 0

    def use(before: Seen, now: Seen) -> None:
        nonlocal images_seen
        for i, x in enumerate(now["x"]):
            target = before["y"][i] if factor is None else now["y"][i]
            for fold in range(_FOLDS):
                part = slice((fold - images_seen) % _FOLDS, None, _FOLDS)
                wanted = _rows(target[part], layer)
                if factor is not None:
                    missing = _as_rows(before["block"][i][part] - now["block"][i][part], len(factor))
                    # Where the block hardly reads a channel, its output says nothing of it.
                    known = factor.abs() > 1e-3 * factor.abs().max()
                    wanted = wanted + torch.where(known, missing / torch.where(known, factor, 1), 0)
                _accumulate(folds[fold], _rows(x[part], layer), wanted)
            images_seen += len(x)

    of_original: Ask = {"y": (original.get_submodule(line), "output")}
    of_converted: Ask = {"x": (layer, "input"), "y": (layer, "output")}
    if factor is not None:
        of_original = {"block": (original.get_submodule(block), "output")}
        of_converted = {**of_converted, "block": (converted.get_submodule(block), "output")}
    run_pairs(original, converted, images, of_original, of_converted, use)
    folds = [fold for fold in folds if fold and float(fold["count"])]
    whole = _total(folds)
    weight = layer.weight.detach().to(whole["xx"]).flatten(1).T  # (in, out)
    ridge = _best_ridge(folds, whole, weight)
    new, offset = _solve(whole, weight, ridge) if ridge < math.inf else (weight, _offset(whole, weight))
    energy = float(whole["tt"] - whole["t"].square().sum() / whole["count"])
    old_error = _error(whole, weight, layer.bias.detach().to(weight))
    new_error = _error(whole, new, offset)
    if not new_error < old_error:
        return Refitted(line, reason="it gives what it gave")
    with torch.no_grad():
        layer.weight.copy_(new.T.reshape(layer.weight.shape))
        layer.bias.copy_(offset)
    return Refitted(line, old_error / energy if energy else 0.0, new_error / energy if energy else 0.0, ridge=ridge)


def _accumulate(sums: dict[str, Tensor], rows: Tensor, target: Tensor) -> None:
    values = {
        "xx": rows.T @ rows,
        "xt": rows.T @ target,
        "x": rows.sum(0),
        "t": target.sum(0),
        "tt": target.square().sum(),
        "count": rows.new_tensor(float(len(rows))),
    }
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


def _total(folds: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([fold[name] for fold in folds]).sum(0) for name in folds[0]}


def _best_ridge(folds: list[dict[str, Tensor]], whole: dict[str, Tensor], weight: Tensor) -> float:
    """The ridge that does best on images which were left out of the solution; infinity keeps the weight."""
    if len(folds) < 2:
        return max(_RIDGES)
    missed = dict.fromkeys(_RIDGES, 0.0)
    for fold in folds:
        rest = {name: whole[name] - fold[name] for name in whole}
        for ridge in _RIDGES:
            new, offset = _solve(rest, weight, ridge) if ridge < math.inf else (weight, _offset(rest, weight))
            missed[ridge] += _error(fold, new, offset)
    return min(missed, key=missed.__getitem__)


def _solve(sums: dict[str, Tensor], weight: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weight ``(in, out)`` and bias, with a ridge towards a weight."""
    gram = sums["xx"] - torch.outer(sums["x"], sums["x"]) / sums["count"]
    cross = sums["xt"] - torch.outer(sums["x"], sums["t"]) / sums["count"]
    weak = (ridge * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny)
    normal = gram + torch.diag(weak.expand(len(gram)))
    new = weight + torch.linalg.solve(normal, cross - gram @ weight)
    return new, _offset(sums, new)


def _offset(sums: dict[str, Tensor], weight: Tensor) -> Tensor:
    """The best bias for a weight."""
    return (sums["t"] - sums["x"] @ weight) / sums["count"]


def _error(sums: dict[str, Tensor], weight: Tensor, bias: Tensor) -> float:
    """Sum of squared errors."""
    square = (weight * (sums["xx"] @ weight)).sum() + sums["tt"] + sums["count"] * bias.square().sum()
    cross = (weight * sums["xt"]).sum() + (bias * sums["t"]).sum() - (bias * (sums["x"] @ weight)).sum()
    return float(square - 2 * cross)


def _rows(x: Tensor, layer: nn.Module) -> Tensor:
    """Positions times channels, float64."""
    return _as_rows(x, x.shape[-1] if isinstance(layer, nn.Linear) else x.shape[1], last=isinstance(layer, nn.Linear))


def _as_rows(x: Tensor, channels: int, last: bool | None = None) -> Tensor:
    if last is None:
        last = not (x.dim() == 4 and x.shape[1] == channels)
    return computed_in((x if last else x.movedim(1, -1)).flatten(0, -2)).double()
