"""Choosing the execution form of every layer: by hand, or by measuring them on the machine at hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter as clock
from typing import Any

import torch
from torch import Tensor, nn

from sw_transplant.config import read_guarantee
from sw_transplant.find.select import Select, selector
from sw_transplant.forms import FORMS
from sw_transplant.forms.dispatch import check_form
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.surgery.race import Race
from sw_transplant.tables import render_table


@dataclass(frozen=True)
class TunedLayer:
    """What was measured of one layer.

    Attributes:
        path: of the layer.
        shape: of the map that it got, ``(B, C, H, W)``.
        milliseconds: of one call, by form, median; a form that cannot run on this map is not there.
        form: what the layer now has: the fastest form, or ``"auto"`` where that takes it anyway, or where none is
            certainly faster than what it takes.
        default: what ``"auto"`` takes on this map.
        certain: whether the times say for certain which form is the fastest.
        rounds: how often the forms were timed side by side.
    """

    path: str
    shape: tuple[int, ...]
    milliseconds: dict[str, float]
    form: str
    default: str = ""
    certain: bool = True
    rounds: int = 0


@dataclass(frozen=True)
class TuneReport:
    """What :func:`tune` measured; as text, a table."""

    layers: list[TunedLayer]

    def __str__(self) -> str:
        rows = [
            [
                layer.path or "(the model)",
                "x".join(map(str, layer.shape)),
                *(f"{layer.milliseconds[form]:.3g}" if form in layer.milliseconds else "" for form in FORMS),
                layer.form if layer.form != "auto" else f"auto ({layer.default})",
                str(layer.rounds),
                "certain" if layer.certain else "not certain, default kept",
            ]
            for layer in self.layers
        ]
        return render_table("Milliseconds of a call", ["layer", "map", *FORMS, "chosen", "rounds", ""], rows)


def set_form(
    model: nn.Module, form: str, *, select: Select = None, guarantee: str | Sequence[str] | None = None
) -> list[str]:
    """Sets the execution form of the Shiftwise layers of a model.

    Args:
        model: a converted model; its layers are changed in place. None of their values is.
        form: ``"auto"`` or one of :data:`forms.FORMS`.
        select: glob patterns of layer paths, or a function ``(path, module) -> bool``; None for all.
        guarantee: what these layers have to keep to, as in :class:`SWConfig`: ``"exact"``, ``"deterministic"``,
            ``"no_fallback"``, several of them, or ``()`` for none; None leaves it as it is.

    Returns:
        The paths of the layers that have this form now.

    Raises:
        ValueError: no form or no guarantee has this name, or there is no such layer.
    """
    check_form(form)
    promised = None if guarantee is None else read_guarantee(guarantee, "set_form: guarantee")
    chosen = _layers(model, select, "set_form")
    for layer in chosen.values():
        layer.form = form
        if promised is not None:
            layer.guarantee = promised
    return list(chosen)


def tune(model: nn.Module, *args: Any, select: Select = None, rounds: int = 7, **kwargs: Any) -> TuneReport:
    """Measures every form of every Shiftwise layer on the maps of one call, and sets the fastest where that is certain.

    Forms are timed side by side, again and again, until one is faster than what ``"auto"`` takes in so many rounds that
    chance is no explanation (:mod:`race`). What is not certain after ``race.MOST`` rounds, as on a busy machine,
    stays ``"auto"``; the report says so.

    The call decides what is measured: device, dtype, autocast, memory format, batch and map are those that the layers
    get from ``model(*args, **kwargs)``; in train mode, with gradients, forward and backward are timed together. Layers
    of equal geometry on equal maps are measured once. What runs is copies of the layers, so that no BatchNorm moves
    by being timed; the one call of the model itself runs in eval mode. ``save`` keeps the forms.

    Args:
        model: a converted model.
        args, kwargs: of a call of the model.
        select: which layers, as in :func:`set_form`; None for all.
        rounds: how often each form is timed at least; they take turns.

    Raises:
        ValueError: there is no such layer, the call does not reach one, or ``rounds`` is less than 1.

    In case of an error every layer keeps its form.
    """
    layers = _layers(model, select, "tune")
    maps = _maps_of_a_call(model, layers, args, kwargs)
    missing = sorted(layers.keys() - maps.keys())
    if missing:
        raise ValueError(f"tune: the call of the model did not reach {missing}; give inputs that do, or select= others")
    known: dict[Any, Race] = {}
    tuned = []
    for path, layer in layers.items():
        x = maps[path]
        trains = layer.training and torch.is_grad_enabled()
        alike = (str(layer).replace(repr(layer.form), ""), x.shape, x.stride(), x.dtype, x.device, trains)
        if alike not in known:
            known[alike] = _measure(layer, x, trains, rounds)
        race = known[alike]
        form = "auto" if race.winner == race.default else race.winner
        tuned.append(TunedLayer(path, tuple(x.shape), race.milliseconds, form, race.default, race.certain, race.rounds))
    for result in tuned:
        layers[result.path].form = result.form
    return TuneReport(tuned)


def _layers(model: nn.Module, select: Select, caller: str) -> dict[str, ShiftwiseConv2d]:
    every = {path: module for path, module in model.named_modules() if isinstance(module, ShiftwiseConv2d)}
    chosen = selector(list(every), select)
    layers = {path: module for path, module in every.items() if chosen(path, module)}
    if not layers:
        raise ValueError(f"{caller}: the model has no Shiftwise layer to choose a form for; convert it first")
    return layers


def _maps_of_a_call(
    model: nn.Module, layers: dict[str, ShiftwiseConv2d], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """An empty map like the first one that each layer gets."""
    maps: dict[str, Tensor] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            maps.setdefault(path, torch.empty_like(inputs[0]))

        return hook

    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        for path, layer in layers.items():
            undo.callback(layer.register_forward_pre_hook(note(path)).remove)
        undo.enter_context(torch.no_grad())
        model.eval()
        model(*args, **kwargs)
    return maps


def _measure(layer: ShiftwiseConv2d, like: Tensor, trains: bool, rounds: int) -> Race:
    """The times of every form that can run."""
    x = torch.randn_like(like).requires_grad_(trains)
    copies, default = {}, ""
    for form in ("auto", *FORMS):
        candidate = copy.deepcopy(layer)
        candidate.form = form
        try:
            _call(candidate, x, trains)  # compiles, fills caches
        except (torch.OutOfMemoryError, MemoryError):
            continue
        ran = "" if candidate.decision is None else candidate.decision.form
        if form == "auto":
            default = ran
        elif ran == form:
            copies[form] = candidate
    race = Race(list(copies), default if default in copies else next(iter(copies)), rounds)
    while order := race.order():
        race.add({form: _milliseconds(copies[form], x, trains) for form in order})
    return race


def _milliseconds(layer: ShiftwiseConv2d, x: Tensor, trains: bool) -> float:
    _wait(x)
    begin = clock()
    _call(layer, x, trains)
    _wait(x)
    return 1e3 * (clock() - begin)


def _call(layer: ShiftwiseConv2d, x: Tensor, trains: bool) -> None:
    with torch.set_grad_enabled(trains):
        y = layer(x)
        if trains:
            y.backward(torch.ones_like(y))


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
