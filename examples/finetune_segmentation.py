"""Trains a segmentation model whose backbone was converted: UperNet around a ConvNeXt, on shapes that are drawn here.

    python examples/finetune_segmentation.py
    python examples/finetune_segmentation.py --model folder --output trained   # an UperNet that save_pretrained wrote

Only `model.backbone` is converted; the decode head has no large kernels. The table has the intersection over union of
each kind of shape on held-out images, before and after, and of the saved and loaded model. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel

import sw_transplant as sw
from sw_transplant.tables import render_table

KINDS = ["background", "disc", "square", "triangle"]
SIZE = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="local folder of an UperNet")
    parser.add_argument("--output", type=Path, help="where the model goes; by default nowhere that stays")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    try:
        model = small_model() if args.model is None else local_model(args.model)
        model.backbone = sw.convert(model.backbone)
    except (ValueError, OSError) as error:  # also where there is nothing to convert
        print(f"finetune_segmentation: {error}", file=sys.stderr)
        return 2
    print(sw.summary(model))
    held_out = draw(32, seed=1)
    before = overlaps(model, held_out)
    train(model, args.steps, args.batch, args.learning_rate)
    after = overlaps(model, held_out)

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, local_files_only=True)
    again = overlaps(loaded, held_out)
    rows = [[kind, *(f"{part[i]:.3f}" for part in (before, after, again))] for i, kind in enumerate(KINDS)]
    columns = ["kind", "before", "after", "saved and loaded"]
    print(render_table("Intersection over union on held-out images", columns, rows))
    faults = {
        "the loaded model is another": not same_state(model, loaded),
        "the loaded model answers otherwise": max(abs(a - b) for a, b in zip(after, again, strict=True)) > 1e-3,
        "nothing was learned": sum(after) <= sum(before),
    }
    failed = [fault for fault, holds in faults.items() if holds]
    print(f"FAILED: {'; '.join(failed)}" if failed else "OK")
    return 1 if failed else 0


def same_state(model: nn.Module, other: nn.Module) -> bool:
    """Whether every name and every bit is the same."""
    state, found = model.state_dict(), other.state_dict()
    return list(state) == list(found) and all(torch.equal(found[name], tensor) for name, tensor in state.items())


def small_model() -> PreTrainedModel:
    backbone = transformers.ConvNextConfig(
        image_size=SIZE,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 2, 1],
        layer_scale_init_value=1.0,  # at ConvNeXt's 1e-6 the blocks would be silent for a long time
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=32, use_auxiliary_head=False, num_labels=len(KINDS)
    )
    return transformers.UperNetForSemanticSegmentation(config).eval()


def local_model(folder: Path) -> PreTrainedModel:
    """An UperNet, its last layer exchanged where it knows another number of kinds."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: has no config.json; expected a local folder that save_pretrained wrote")
    return transformers.UperNetForSemanticSegmentation.from_pretrained(
        folder, local_files_only=True, ignore_mismatched_sizes=True, num_labels=len(KINDS)
    ).eval()


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images ``(count, 3, SIZE, SIZE)`` float32 of a few shapes on noise, and the kind at every pixel, int64."""
    chance = random.Random(seed)
    noise = np.random.default_rng(seed)
    images, labels = [], []
    for _ in range(count):
        image, label = Image.new("RGB", (SIZE, SIZE), colour(chance, 0, 100)), Image.new("L", (SIZE, SIZE), 0)
        for kind in chance.choices(range(1, len(KINDS)), k=2):
            half = chance.randint(9, 15)
            x, y = (chance.randint(half, SIZE - half) for _ in range(2))
            draw_shape(ImageDraw.Draw(image), kind, x, y, half, colour(chance, 130, 255))
            draw_shape(ImageDraw.Draw(label), kind, x, y, half, kind)
        pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1 + noise.normal(0, 0.1, (SIZE, SIZE, 3))
        images.append(torch.from_numpy(pixels.transpose(2, 0, 1)).float())
        labels.append(torch.from_numpy(np.asarray(label, dtype=np.int64)))
    return torch.stack(images), torch.stack(labels)


def colour(chance: random.Random, darkest: int, brightest: int) -> tuple[int, ...]:
    return tuple(chance.randint(darkest, brightest) for _ in range(3))


def draw_shape(canvas: Any, kind: int, x: int, y: int, half: int, fill: Any) -> None:
    corners = (x - half, y - half, x + half, y + half)
    if KINDS[kind] == "disc":
        canvas.ellipse(corners, fill=fill)
    elif KINDS[kind] == "square":
        canvas.rectangle(corners, fill=fill)
    else:
        canvas.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=fill)


def train(model: PreTrainedModel, steps: int, batch: int, learning_rate: float) -> None:
    """An ordinary loop; the optimizer is made after the conversion, since it has to know the new parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for step in track(range(steps), "training"):
        images, labels = draw(batch, seed=100 + step)
        loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def overlaps(model: PreTrainedModel, data: tuple[Tensor, Tensor]) -> list[float]:
    """Intersection over union of each kind, over all pixels of all images."""
    model.eval()
    pairs = zip(data[0].split(8), data[1].split(8), strict=True)
    found = [(model(pixel_values=images).logits.argmax(1), labels) for images, labels in pairs]
    answers, truth = (torch.cat(part) for part in zip(*found, strict=True))
    kinds = range(len(KINDS))
    both = [int(((answers == kind) & (truth == kind)).sum()) for kind in kinds]
    either = [int(((answers == kind) | (truth == kind)).sum()) for kind in kinds]
    return [b / max(e, 1) for b, e in zip(both, either, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
