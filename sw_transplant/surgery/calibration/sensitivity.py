"""What an error of a layer's response costs downstream: a matrix over channels, from gradients of the original.

Channels are not equal: what follows a layer reads some of them more than others, and errors of several may add up or
cancel. To first order an error e (C numbers at a position) changes a random projection of the network's output by
<g, e>, g the gradient of that projection. On average over projections, images and positions its square is e' S e with
S = mean of g g'. No labels are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from sw_transplant.surgery.calibration.images import Images
from sw_transplant.surgery.calibration.moments import computed_in
from sw_transplant.surgery.calibration.responses import frozen, tensors_of

_IMAGES, _PROJECTIONS = 48, 4
"""How many images suffice for C x C numbers that all positions share in, and projections of each output."""


class _SufficientError(Exception):
    """Enough images were seen."""


def sensitivities(
    model: nn.Module, images: Images, layers: Mapping[str, nn.Module], seed: int
) -> tuple[dict[str, Tensor], list[str]]:
    """For each layer the mean of g g', float64 ``(C, C)``; the average of its diagonal over the layers is kept.

    Args:
        model: the original; as it was afterwards.
        images: what it runs on; gradients go through the first 48 at most.
        layers: modules of it, by path.
        seed: of the projections.

    Returns:
        By path, the identity for layers that no gradient reaches; and which these are, and why, for the report.
    """
    totals: dict[str, Tensor] = {}
    channels = dict.fromkeys(layers, 0)
    probes: list[tuple[str, Tensor]] = []
    generator = torch.Generator().manual_seed(seed)
    count, failure = 0, ""

    def insert(path: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            probe = torch.zeros_like(output, requires_grad=True)
            probes.append((path, probe))
            channels[path] = output.shape[1]
            return output + probe

        return hook

    def gather(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal count
        outputs = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        for number in range(_PROJECTIONS if probes and outputs else 0):
            projection = torch.zeros((), device=probes[0][1].device)
            for tensor in outputs:
                direction = torch.randn(tensor.shape, generator=generator).to(tensor)
                if tensor.dim() == 2:  # logits: what all classes gain alike changes nothing
                    direction = direction - direction.mean(1, keepdim=True)
                projection = projection + (tensor * direction).sum().to(projection)
            gradients = torch.autograd.grad(
                projection, [probe for _, probe in probes], retain_graph=number + 1 < _PROJECTIONS, allow_unused=True
            )
            for (path, _probe), gradient in zip(probes, gradients, strict=True):
                if gradient is not None:
                    lines = computed_in(gradient).transpose(0, 1).flatten(1)
                    with torch.autocast(lines.device.type, enabled=False):
                        totals[path] = totals.get(path, 0) + (lines @ lines.T).double()
        count += len(probes[0][1]) if probes else 1
        probes.clear()
        if count >= _IMAGES:
            raise _SufficientError

    with frozen(model), torch.random.fork_rng(devices=[]), ExitStack() as undo:
        for path, layer in layers.items():
            undo.callback(layer.register_forward_hook(insert(path)).remove)
        undo.callback(model.register_forward_hook(gather).remove)
        torch.manual_seed(seed)
        for run in images.runs():
            try:
                run(model)
            except _SufficientError:
                break
            except RuntimeError as error:  # it runs without gradients, or will say so itself: this is for gradients
                failure = f" ({shorten(str(error), 120)})"
                totals.clear()
                break
    totals = {path: total for path, total in totals.items() if bool(torch.isfinite(total).all()) and bool(total.any())}
    weights = _normalised(totals, channels)
    unseen = [path or "the model" for path in channels if path not in totals]
    if not unseen:
        return weights, []
    return weights, [f"No gradients at {', '.join(unseen)}{failure}: errors of all channels count alike there."]


def _normalised(totals: dict[str, Tensor], channels: Mapping[str, int]) -> dict[str, Tensor]:
    """Scaled alike, so that the diagonals average to 1."""
    mean = torch.cat([total.diagonal() for total in totals.values()]).mean() if totals else torch.ones(())
    result = {}
    for path in channels:
        if path in totals:
            result[path] = totals[path] / mean.to(totals[path])
        else:
            result[path] = torch.eye(channels[path], dtype=torch.float64)
    return result


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output; the logits alone where it has such."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return [logits]
    return tensors_of(output)
