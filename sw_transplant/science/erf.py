"""Effective receptive fields: how much every pixel of the image contributes to the centre of the last map.

Two definitions, both of one matrix of contributions:

- the *table* (SLaK, Table 10; RepLKNet): the share of the image's area that a centred square needs to hold a share t of
  ``log10(matrix + 1)``, scaled to at most 1. The logarithm depends on the scale: the matrix is not normalised before;
- the *picture* (SLaK, Figure 3): the matrix itself, divided by its maximum, without a logarithm.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sw_transplant.surgery.calibration.progress import progress_bar

SHARES = (0.2, 0.3, 0.5, 0.99)
"""The shares t of the published table."""
PUBLISHED_SIZE = 1024
Map = str | Callable[[nn.Module, Tensor], Tensor]


class Square(NamedTuple):
    """A square in the centre of the image.

    Attributes:
        side: in pixels.
        ratio: its share of the image's area, 0 to 1: the published r.
    """

    side: int
    ratio: float


def effective_receptive_field(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    size: int = PUBLISHED_SIZE,
    map: Map | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> Tensor:
    """How much every pixel contributes to the centre of a network's last map.

    The model runs in eval mode on square images. Of the map before norm and pooling, the positive values at its centre
    ``(H // 2, W // 2)`` are added up; of the gradient of that sum with respect to the normalised image the positive
    part is taken, summed over channels, and averaged over the images.

    Args:
        model: any network of images; its mode, gradients and weights stay as they are.
        images: normalised, (N, C, H, W); or batches of such tensors, alone or as the first of a pair (a DataLoader).
            Those of another size are resized without cropping, bicubic.
        size: height and width; 1024 in the papers.
        map: what the map is: the path of a module, whose output is taken, or a function ``(model, images) -> map``.
            None: the last of ``model.stages``, else ``model.forward_features``.
        batch_size: images at once.
        progress: show a bar on stderr where that is a terminal.

    Returns:
        float64 (size, size) on the CPU. Images whose gradient is not finite are left out; a warning counts them.

    Raises:
        ValueError: no image; none with finite gradients; no map (B, C, H, W) where ``map`` says.

    Example:
        >>> matrix = effective_receptive_field(model, images, size=256)                      # doctest: +SKIP
        >>> high_contribution_ratio(matrix, 0.5)                                             # doctest: +SKIP
        0.123
    """
    like = next(model.parameters())
    total, used, left_out = torch.zeros(size, size, dtype=torch.float64, device="cpu"), 0, 0
    count = -(-len(images) // batch_size) if isinstance(images, Tensor) else getattr(images, "__len__", lambda: 1)()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with progress_bar(progress, count, "images") as step:
            for chunk in _chunks(images, batch_size):
                step("")
                x = chunk.to(like)
                if x.shape[-2:] != (size, size):
                    x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
                contributions = _contributions(model, x.detach(), map)
                finite = contributions.isfinite().flatten(1).all(1)
                used, left_out = used + int(finite.sum()), left_out + int((~finite).sum())
                total += contributions[finite].sum(0).cpu()
    finally:
        for module, training in modes.items():
            module.training = training
    if not used:
        what = f"all {left_out} images give gradients that are not finite" if left_out else "there are no images"
        raise ValueError(f"effective_receptive_field: {what}, expected at least one that counts")
    if left_out:
        message = (
            f"effective_receptive_field: {left_out} of {used + left_out} images give gradients that are not finite"
        )
        warnings.warn(f"{message}; they are left out", stacklevel=2)
    return total / used


def high_contribution_square(matrix: Tensor, share: float) -> Square:
    """The smallest centred square that holds more than a share of the logarithm of the contributions.

    Centred is at pixel ``size // 2``; sides are odd, 3 and up.

    Args:
        matrix: of :func:`effective_receptive_field`, not normalised.
        share: t, above 0 and below 1.

    Returns:
        Side and share of the area; the whole image where no square within it holds so much.

    Raises:
        ValueError: no square matrix of finite numbers of 0 and more, some above 0; a share out of its range.
    """
    if not 0 < share < 1:
        raise ValueError(f"high_contribution_square: share {share}, expected one above 0 and below 1")
    size = matrix.shape[-1]
    if matrix.shape != (size, size) or not bool(matrix.isfinite().all()) or not float(matrix.max()) > 0 <= matrix.min():
        raise ValueError(
            f"high_contribution_square: a matrix of shape {tuple(matrix.shape)} from {float(matrix.min())} to "
            f"{float(matrix.max())}, expected a square one of finite contributions of 0 and more, not all 0"
        )
    logarithm = log_contributions(matrix)
    sums = F.pad(logarithm.cumsum(0).cumsum(1), (1, 0, 1, 0))
    whole, centre = float(sums[-1, -1]), size // 2
    for i in range(1, size - centre):
        first, last = centre - i, centre + i + 1
        inside = sums[last, last] - sums[first, last] - sums[last, first] + sums[first, first]
        if float(inside) / whole > share:
            return Square(2 * i + 1, ((2 * i + 1) / size) ** 2)
    return Square(size, 1.0)


def high_contribution_ratio(matrix: Tensor, share: float) -> float:
    """The published r (SLaK, Table 10): the area of :func:`high_contribution_square`, as a share of the image's."""
    return high_contribution_square(matrix, share).ratio


def log_contributions(matrix: Tensor) -> Tensor:
    """What the table measures: ``log10(matrix + 1)``, scaled to at most 1."""
    logarithm = (matrix.double() + 1).log10()
    return logarithm / logarithm.max()


def relative_contributions(matrix: Tensor) -> Tensor:
    """What the picture shows: the matrix divided by its maximum."""
    return matrix.double() / matrix.max()


def _chunks(images: Tensor | Iterable[Any], batch_size: int) -> Iterator[Tensor]:
    for batch in [images] if isinstance(images, Tensor) else images:
        tensor = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            raise ValueError(
                f"effective_receptive_field: {type(tensor).__name__} of shape {tuple(getattr(tensor, 'shape', ()))}, "
                "expected images (N, C, H, W), or batches of them"
            )
        yield from tensor.split(batch_size)


def _contributions(model: nn.Module, x: Tensor, map: Map | None) -> Tensor:
    """(B, H, W), float64."""
    with torch.enable_grad():
        x = x.requires_grad_(True)
        features = _map(model, x, map)
        if not isinstance(features, Tensor) or features.dim() != 4:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"effective_receptive_field: the map is {shape}, expected (B, C, H, W); name the module that gives it: "
                "map='stages.3'"
            )
        height, width = features.shape[2:]
        centre = features[:, :, height // 2, width // 2].relu().sum()
        (gradient,) = torch.autograd.grad(centre, x)
    return gradient.relu().double().sum(1)


def _map(model: nn.Module, x: Tensor, map: Map | None) -> Any:
    if callable(map):
        return map(model, x)
    if map is None:
        stages = getattr(model, "stages", None)
        if isinstance(stages, nn.ModuleList | nn.Sequential) and len(stages):
            return _output_of(model, stages[-1], x, "stages")
        forward_features = getattr(model, "forward_features", None)
        if callable(forward_features):
            return forward_features(x)
        raise ValueError(
            f"effective_receptive_field: {type(model).__name__} has neither stages nor forward_features; name the "
            "module that gives the last map: map='layer4'"
        )
    try:
        module = model.get_submodule(map)
    except AttributeError as error:
        raise ValueError(
            f"effective_receptive_field: the model has no module {map!r}, expected a path in it"
        ) from error
    return _output_of(model, module, x, map)


def _output_of(model: nn.Module, module: nn.Module, x: Tensor, name: str) -> Any:
    outputs: list[Any] = []
    hook = module.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        model(x)
    finally:
        hook.remove()
    if not outputs:
        raise ValueError(f"effective_receptive_field: {name} did not run; name a module that does: map='stages.3'")
    return outputs[-1]
