"""How many ghosts each layer gets where one budget is for all: by what they cost the whole network, as it is tried.

Gradients tell which channels of a layer the network misses least. Layers do not compare by them: ghosts are no small
change, and the first order says little of how much they cost. So the original runs with ghosts in one layer at a time,
and what its answers lose by that is measured. It grows with about the square of their share, and adds up over layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sw_transplant.find.match import Match
from sw_transplant.surgery.calibration.ghosts import cheapest, exchange
from sw_transplant.surgery.calibration.images import Images
from sw_transplant.surgery.calibration.moments import computed_in
from sw_transplant.surgery.calibration.responses import copies, logits_of, quiet, tensors_of

_IMAGES = 64
"""How many are tried at most: what is wanted is one number for each layer."""

_MOST = 0.75
"""Of a layer's channels: a module needs some that it is made for."""


class _EnoughError(Exception):
    """Enough images were seen."""


@torch.no_grad()
def global_budget(
    model: nn.Module,
    images: Images,
    matches: Sequence[Match],
    weights: Mapping[str, Tensor],
    counts: Mapping[str, int],
    mix: float,
) -> dict[str, int]:
    """How many ghosts each layer gets: as large a share on average as with equal ones.

    Args:
        model: the original; as it was afterwards.
        images: what it runs on, the first 64 at most, as many times as twice the number of layers.
        matches: the layers.
        weights: by path, what errors of channels cost, ``(C, C)``.
        counts: by path, how many ghosts each has where shares are equal.
        mix: how far errors of other channels count.
    """
    sites = {match.path: model.get_submodule(match.path) for match in matches}
    strides = {match.path: match.stride for match in matches}
    changes = _changes(model, images, sites, strides)
    channels = {match.path: match.out_channels for match in matches}
    trials = []
    for path, change in changes.items():
        weight = weights[path].to(change)
        cost = (mix * weight + (1 - mix) * torch.diag(weight.diagonal())) * change
        for count in dict.fromkeys(min(times * counts[path], round(_MOST * channels[path])) for times in (1, 2)):
            start = cheapest(cost.diagonal(), count)
            trials.append((path, exchange(start, torch.zeros_like(cost[0]), cost) if count else start))
    losses = _losses(model, images, sites, strides, trials)
    growth = {}
    for path in sites:
        points = [
            (len(chosen) / channels[path], loss)
            for (where, chosen), loss in zip(trials, losses, strict=True)
            if where == path
        ]
        most = sum(share**4 for share, _ in points)
        growth[path] = sum(loss * share**2 for share, loss in points) / most if most else 0.0
    return share_out(growth, channels, sum(counts[path] / channels[path] for path in sites))


def share_out(growth: Mapping[str, float], channels: Mapping[str, int], budget: float) -> dict[str, int]:
    """The numbers of ghosts that cost least together, where a share s of a layer's channels costs its growth times s².

    Args:
        growth: by layer.
        channels: C, by layer. A ghost takes 1 / C of the budget.
        budget: the sum of all shares.

    Returns:
        By layer, how many; no more than three quarters of its channels.
    """
    quota, left = dict.fromkeys(growth, 0), budget
    while True:
        offers = []
        for path, factor in growth.items():
            size, next_one = channels[path], quota[path] + 1
            if next_one <= _MOST * size and left >= 1 / size - 1e-9:
                offers.append((max(factor, 1e-12) * (2 * next_one - 1) / size, path))
        if not offers:
            return quota
        _, path = min(offers)
        quota[path] += 1
        left -= 1 / channels[path]


def _passed(x: Tensor, y: Tensor, stride: tuple[int, int]) -> Tensor:
    """What a layer would give if all its channels were ghosts."""
    return x[:, :, :: stride[0], :: stride[1]][:, :, : y.shape[2], : y.shape[3]]


def _changes(
    model: nn.Module, images: Images, sites: Mapping[str, nn.Module], strides: Mapping[str, tuple[int, int]]
) -> dict[str, Tensor]:
    """By layer ``(C, C)``: products of what ghosts change of the responses, summed over images and positions."""
    totals: dict[str, Tensor] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: Tensor) -> None:
            change = _passed(inputs[0], output, strides[path]) - output
            lines = computed_in(change).double().transpose(0, 1).flatten(1)
            totals[path] = totals.get(path, 0) + lines @ lines.T

        return hook

    with ExitStack() as undo:
        for path, site in sites.items():
            undo.callback(site.register_forward_hook(note(path)).remove)
        _run(model, images, lambda *_: None)
    return totals


def _losses(
    model: nn.Module,
    images: Images,
    sites: Mapping[str, nn.Module],
    strides: Mapping[str, tuple[int, int]],
    trials: Sequence[tuple[str, tuple[int, ...]]],
) -> list[float]:
    """How far the model's answers are from its own where some channels of one layer are ghosts, for each trial."""
    now: dict[str, tuple[int, ...]] = {}
    losses = [0.0] * len(trials)

    def pass_on(path: str) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            if not now.get(path):
                return None
            ghosts = torch.tensor(now[path], device=output.device)
            return output.index_copy(1, ghosts, _passed(inputs[0], output, strides[path])[:, ghosts])

        return hook

    def try_all(output: Any, call: Callable[[], Any]) -> None:
        for number, (path, ghosts) in enumerate(trials):
            now.clear()
            now[path] = ghosts
            losses[number] += _distance(call(), output) if ghosts else 0.0
        now.clear()

    with ExitStack() as undo:
        for path, site in sites.items():
            undo.callback(site.register_forward_hook(pass_on(path)).remove)
        _run(model, images, try_all)
    return [loss if loss < torch.inf else torch.inf for loss in losses]


def _run(model: nn.Module, images: Images, use: Callable[[Any, Callable[[], Any]], None]) -> None:
    """Runs a model on some images; ``use`` gets its output and what calls it again on the same arguments."""
    count, again = 0, False
    kept: list[Any] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        if not again:
            kept[:] = copies(args), copies(kwargs)

    def after(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal again, count
        if again:
            return
        args, kwargs = kept
        again = True
        try:
            use(output, lambda: model(*copies(args), **copies(kwargs)))
        finally:
            again = False
        first = tensors_of((args, kwargs))
        count += len(first[0]) if first and first[0].dim() else 1
        if count >= _IMAGES:
            raise _EnoughError

    with quiet(model), ExitStack() as undo:
        undo.callback(model.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
        undo.callback(model.register_forward_hook(after).remove)
        for run in images.runs():
            try:
                run(model)
            except _EnoughError:
                break


def _distance(output: Any, reference: Any) -> float:
    """The KL divergence of the classes, summed over images; of other outputs the relative squared error."""
    mine, theirs = logits_of(output), logits_of(reference)
    if mine is not None and theirs is not None:
        a, b = (each.float().log_softmax(1) for each in (theirs, mine))
        return float(F.kl_div(b, a, log_target=True, reduction="sum"))
    total = 0.0
    for a, b in zip(tensors_of(output), tensors_of(reference), strict=True):
        energy = float(b.float().square().sum())
        total += float((a.float() - b.float()).square().sum()) / energy if energy else 0.0
    return total
