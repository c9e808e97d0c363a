"""What networks are run on, and the number that is made of their outputs for a backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.nasty.networks import Network


def draw_images(network: Network, size: tuple[int, int], kind: str, seed: int) -> Tensor:
    """Maps ``(batch, channels, *size)`` of the network's world.

    Args:
        network: what they are for.
        size: height and width.
        kind: "noise", "zeros", "large", "not finite" (two numbers are not), or "one image".
        seed: of the noise.
    """
    world, generator = network.world, torch.Generator().manual_seed(seed)
    batch = () if world.batch is None else (1 if kind == "one image" else world.batch,)
    images = torch.randn(*batch, network.channels, *size, generator=generator, dtype=torch.float64)
    if kind == "zeros":
        images.zero_()
    if kind == "large":
        images *= 1e2
    if kind == "not finite" and images.numel():
        images.view(-1)[images.numel() // 3] = float("nan")
        images.view(-1)[images.numel() // 2] = float("inf")
    return images.to(getattr(torch, world.dtype))


def lay(images: Tensor, layout: str) -> Tensor:
    """A copy that lies in memory as asked for: "contiguous", "channels_last", "slice" or "expanded"."""
    if layout == "channels_last" and images.dim() == 4:
        return images.clone(memory_format=torch.channels_last)
    if layout == "slice":
        wide = torch.zeros(*images.shape[:-1], images.shape[-1] + 3, dtype=images.dtype)
        wide[..., 1:-2] = images
        return wide[..., 1:-2]
    if layout == "expanded" and images.dim() == 4 and len(images):
        return images[:1].clone().expand(images.shape)
    return images.clone()


def scalar(leaves: list[Any]) -> Tensor:
    """A number that depends on every element of the tensors that want gradients."""
    generator = torch.Generator().manual_seed(4)
    total = torch.zeros(())
    for one in leaves:
        if isinstance(one, Tensor) and one.requires_grad:
            weight = torch.randn(one.shape, generator=generator, dtype=torch.float64).to(one)
            total = total + (one * weight).sum()
    return total
