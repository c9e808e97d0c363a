"""Running the original and the network converted so far side by side, and looking at layers inside of both.

Whoever runs the converted network runs the original, too: on the same arguments, just before. So a user's own function
need not know of two networks. Where batches are given, a run ends as soon as everything asked for has been seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sw_transplant.surgery.calibration.images import Images, Run

What = Literal["input", "output", "logits"]
Ask = Mapping[str, tuple[nn.Module, What]]
"""What to look at: by a key of one's own, a module, and whether its first input, its output or, of a whole network, its
logits are wanted (nothing is seen where there are none)."""
Seen = dict[str, list[Tensor]]
"""By key, one tensor for each time that the module was called in a run."""


class _EnoughError(Exception):
    """Everything that was asked for has been seen; the rest of the run would be in vain."""


@dataclass
class Visit:
    """How a module was run.

    Attributes:
        calls: how often in the first run.
        rank: which of those asked for came first.
        inputs, outputs: shapes, of its first call.
    """

    rank: int
    calls: int = 0
    inputs: list[torch.Size] = field(default_factory=list)
    outputs: list[torch.Size] = field(default_factory=list)


def visits(model: nn.Module, images: Images, modules: Mapping[str, nn.Module]) -> dict[str, Visit]:
    """Which modules the first run reaches, in the order of their first calls.

    A function that is given as images is run as a whole.
    """
    met: dict[str, Visit] = {}

    def note(key: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            visit = met.setdefault(key, Visit(len(met)))
            visit.calls += 1
            visit.inputs.append(inputs[0].shape)
            visit.outputs.append(output.shape)

        return hook

    with quiet(model), ExitStack() as undo:
        for key, module in modules.items():
            undo.callback(module.register_forward_hook(note(key)).remove)
        next(images.runs())(model)
    return met


def run_pairs(
    original: nn.Module | None,
    converted: nn.Module,
    images: Images,
    of_original: Ask,
    of_converted: Ask,
    use: Callable[[Seen, Seen], None],
    *,
    held_out: bool = False,
    whole: bool = False,
) -> None:
    """Runs both models on all images, in eval mode, without gradients, and hands over what was seen in each run.

    Args:
        original, converted: two models of the same interface; the first may be None, then the second runs alone.
        images: what they run on.
        of_original, of_converted: what to look at.
        use: gets what was seen of the original and of the converted network.
        held_out: run on the images that are held out instead.
        whole: let every run end by itself.
    """
    seen: tuple[Seen, Seen] = ({}, {})
    ends = not (whole or images.is_function)

    def first(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen[0].clear()
        seen[1].clear()
        if original is not None:
            with watch(original, of_original, seen[0], ends=ends) as run:
                run(lambda model: model(*copies(args), **copies(kwargs)))

    def after(*_: Any) -> None:
        use(*seen)

    with ExitStack() as undo:
        for model in (original, converted):
            if model is not None:
                undo.enter_context(quiet(model))
        undo.callback(converted.register_forward_pre_hook(first, with_kwargs=True, prepend=True).remove)
        if not ends:
            undo.callback(converted.register_forward_hook(after).remove)
        for run in images.runs(held_out=held_out):
            with watch(converted, of_converted, seen[1], ends=ends) as watched:
                watched(run)
            if ends:
                after()


@contextmanager
def watch(model: nn.Module, ask: Ask, seen: Seen, *, ends: bool) -> Iterator[Callable[[Run], None]]:
    """Gives what makes a run of a model and notes what is asked for in ``seen``; ``ends``: stops after one of each.

    A module that is called several times is noted each time, so a run then goes to its end.
    """
    missing = set(ask)

    def note(key: str, what: What) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: Any = None) -> None:
            wanted = logits_of(output) if what == "logits" else inputs[0] if what == "input" else output
            if wanted is not None:
                seen.setdefault(key, []).append(wanted.detach().clone())
            missing.discard(key)
            if ends and not missing:
                raise _EnoughError

        return hook

    def run(call: Run) -> None:
        missing.update(ask)
        with suppress(_EnoughError):
            call(model)

    with ExitStack() as undo:
        for key, (module, what) in ask.items():
            register = module.register_forward_pre_hook if what == "input" else module.register_forward_hook
            undo.callback(register(note(key, what)).remove)
        yield run


def logits_of(output: Any) -> Tensor | None:
    """The logits ``(B, classes)`` in a network's output; None where there are none."""
    output = getattr(output, "logits", output)
    return output if isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1 else None


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and random numbers from a seed; everything as before afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        try:
            model.eval()
            yield
        finally:
            for module, training in flags:
                module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, gradients for activations and none for parameters, also inside ``torch.inference_mode()``.

    Everything is as before afterwards.
    """
    flags = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training
        for parameter, trains in wanted:
            parameter.requires_grad_(trains)


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors in nested arguments or outputs."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def copies(value: Any) -> Any:
    """Nested arguments with tensors of their own: a model may write into what it gets."""
    return torch.utils._pytree.tree_map_only(Tensor, torch.clone, value)
