"""Images where there are none: painted from shapes and textures, then moved until the network finds them familiar.

Noise has neither edges nor surfaces, and leaves a trained network with maps that it never saw. Shapes that cover each
other, sizes by a power law, give images the edges and the spectrum of photographs ("dead leaves"). What they lack, the
model tells: its BatchNorms hold mean and variance of every channel on the training images. A few steps of gradient
descent on the pixels bring those of the painted images closer to them, and give each image a class where there are any.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sw_transplant.geometry import Size
from sw_transplant.surgery.calibration.progress import progress_bar
from sw_transplant.surgery.calibration.responses import frozen, logits_of

_SHAPES = 80
"""Painted one over the other in each image."""


def synthesise(
    model: nn.Module,
    shape: tuple[int, int, int],
    count: int,
    *,
    steps: int = 30,
    seed: int = 0,
    progress: bool = True,
    batch_size: int = 16,
    rate: float = 0.05,
    class_weight: float = 0.1,
) -> Tensor:
    """Images for a model, made from nothing but the model.

    Args:
        model: as it is afterwards; its BatchNorms are what the images are moved towards.
        shape: (C, H, W) of an image.
        count: how many.
        steps: of gradient descent; 0 for painted images as they are.
        seed: of everything that is drawn.
        progress: show a bar on stderr where that is a terminal.

    Returns:
        float32 ``(count, C, H, W)``, on the CPU, of mean 0 and deviation 1 over all: normalised, as models take them.
    """
    images = paint(shape, count, seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
    if not steps or not norms:
        return images
    with progress_bar(progress, -(-count // batch_size), "synthesising") as step:
        parts = []
        for number, batch in enumerate(images.split(batch_size)):
            step(f"{number * batch_size} of {count}")
            parts.append(_familiar(model, norms, batch, steps, rate, class_weight, number * batch_size))
    return torch.cat(parts)


def image_shape(model: nn.Module, input_size: int | tuple[int, ...] | None) -> tuple[int, int, int]:
    """(C, H, W) of a model's images.

    Args:
        model: its first convolution tells C where ``input_size`` does not.
        input_size: S, (H, W) or (C, H, W); None for what timm's or Hugging Face's configuration of the model says.

    Raises:
        ValueError: no size is given and none is known.
    """
    known = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    config = getattr(model, "config", None)
    found = known.get("input_size") if isinstance(known, dict) else None
    size = input_size if input_size is not None else found or getattr(config, "image_size", None)
    size = (size, size) if isinstance(size, int) else size
    if not isinstance(size, tuple | list) or len(size) not in (2, 3) or min(size) < 1:
        raise ValueError(
            f"calibration: 'synthetic' images of size {size!r} for {type(model).__name__}, expected S, (H, W) or "
            "(C, H, W); give Calibration('synthetic', input_size=...)"
        )
    if len(size) == 3:
        return int(size[0]), int(size[1]), int(size[2])
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    return first, int(size[0]), int(size[1])


def paint(shape: tuple[int, int, int], count: int, seed: int) -> Tensor:
    """Images of ellipses that cover each other, shaded, over and under smooth noise; as :func:`synthesise` returns."""
    channels, height, width = shape
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.rand(count, *size, generator=g)

    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    images = _smooth_noise(count, channels, (height, width), 1.5, g)
    for _ in range(_SHAPES):
        centre, angle = 1.2 * draw(2) - 0.1, math.pi * draw(1, 1)
        radius = 0.04 / (1 - 0.97 * draw(1, 1)).sqrt()  # few large ones, many small ones
        across, down = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
        along = angle.cos() * across + angle.sin() * down
        beside = (angle.cos() * down - angle.sin() * across) * (1 + 2 * draw(1, 1))
        inside = torch.sigmoid((radius - (along.square() + beside.square()).sqrt()) * min(height, width))[:, None]
        colour = torch.randn(count, 1, 1, 1, generator=g) + 0.35 * torch.randn(count, channels, 1, 1, generator=g)
        shade = torch.randn(count, 1, 1, 1, generator=g) * (along / radius)[:, None] * 0.3
        images = images + inside * (colour + shade - images)
    images = images + 0.25 * draw(1, 1, 1) * _smooth_noise(count, channels, (height, width), 1.0, g)
    images = images * (0.5 + draw(1, 1, 1)) + 0.3 * torch.randn(count, 1, 1, 1, generator=g)
    return (images - images.mean()) / images.std()


def _smooth_noise(count: int, channels: int, size: Size, power: float, g: torch.Generator) -> Tensor:
    """Gaussian noise whose amplitude falls with the frequency to this power."""
    noise = torch.randn(count, channels, *size, generator=g)
    rows, columns = torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1])
    weight = (rows.square() + columns.square()).sqrt().clamp(min=1 / max(size)).pow(-power)
    smooth = torch.fft.irfft2(torch.fft.rfft2(noise) * weight, s=size)
    return smooth / smooth.std((1, 2, 3), keepdim=True)


def _familiar(
    model: nn.Module, norms: list[nn.BatchNorm2d], batch: Tensor, steps: int, rate: float, weight: float, first: int
) -> Tensor:
    """One batch, moved towards the statistics that the BatchNorms hold."""
    like = next(model.parameters())
    losses: list[Tensor] = []

    def hook(norm: nn.Module, inputs: Any) -> None:
        x, bn = inputs[0].float(), norm
        mean: Any = bn.running_mean
        deviation = (bn.running_var.float() + bn.eps).sqrt()  # type: ignore[union-attr, operator]
        got, spread = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False).add(1e-8).sqrt()
        losses.append((((got - mean.float()) / deviation).square() + (spread / deviation - 1).square()).mean())

    with frozen(model), ExitStack() as undo:
        for norm in norms:
            undo.callback(norm.register_forward_pre_hook(hook).remove)
        pixels = batch.to(like.device, torch.float32, copy=True).requires_grad_()
        optimizer = torch.optim.Adam([pixels], rate)
        for _ in range(steps):
            losses.clear()
            try:
                logits = logits_of(model(pixels.to(like.dtype)))
                loss = torch.stack(losses).mean()
                if logits is not None and weight:
                    labels = (torch.arange(len(batch), device=like.device) + first) % logits.shape[1]
                    loss = loss + weight * F.cross_entropy(logits.float(), labels)
                optimizer.zero_grad()
                loss.backward()
            except RuntimeError:  # no gradients, or no BatchNorm in the model's way: the painting stays
                return batch
            assert pixels.grad is not None
            pixels.grad = _blurred(pixels.grad)  # what a network reads into single pixels is no image
            optimizer.step()
        return pixels.detach().cpu()


def _blurred(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)
