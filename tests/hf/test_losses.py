"""Twenty steps of training: the converted model learns what the original learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sw_transplant import convert, restore
from tests.acceptance import shiftwise_layers
from tests.hf.models import MODELS
from tests.sampling import sample

STEPS, BATCH, CLASSES = 20, 2, 3


def batch(name: str, step: int) -> dict[str, Any]:
    """Images and labels of the kind that the model takes."""
    size = MODELS[name].size
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, size, size, generator=generator)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    if name == "UperNet":
        return {"pixel_values": images, "labels": labels[:, None, None].expand(BATCH, size, size)}
    if name == "Mask2Former":
        masks = (torch.rand(BATCH, 1, size, size, generator=generator) < 0.5).float()
        return {"pixel_values": images, "mask_labels": list(masks), "class_labels": list(labels[:, None])}
    return {"pixel_values": images} if name == "DINOv3" else {"pixel_values": images, "labels": labels}


def loss_of(output: Any) -> Tensor:
    """The model's own; of one without a head, how far its features are from 1."""
    loss = getattr(output, "loss", None)
    return (output.pooler_output - 1).square().mean() if loss is None else loss


def train(model: Any, name: str) -> list[float]:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3, weight_decay=0.05)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)  # Mask2Former draws the points at which it compares masks
        loss = loss_of(model(**batch(name, step % 4)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", sample(MODELS, ["ConvNext", "DINOv3", "UperNet"]))
def test_losses_agree_and_what_was_learned_goes_back(name: str) -> None:
    original = MODELS[name].model()
    converted = convert(original)
    before = {path: layer.weight.clone() for path, layer in shiftwise_layers(converted).items()}
    expected, got = train(original, name), train(converted, name)
    assert min(expected[-4:]) < min(expected[:4]), "it learns nothing"
    assert got == pytest.approx(expected, rel=1e-6)
    moved = [not torch.equal(layer.weight, before[path]) for path, layer in shiftwise_layers(converted).items()]
    assert len(moved) == MODELS[name].layers
    assert all(moved)
    state, wanted = restore(converted).state_dict(), original.state_dict()
    assert list(state) == list(wanted)
    for key, tensor in wanted.items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-4, atol=1e-5, msg=key)
