"""Trains the small SLaK that the demo converts, on the digits of scikit-learn. A minute on one CPU core.

    python examples/train_digits_slak.py

Afterwards it sets the long strips to zero: answers that then change show that the network does use them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from digits import CONFIG, PREPROCESSING, WEIGHTS, Digits, digits, without_strips
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sw_transplant.models import SLaK

BATCH, LEARNING_RATE, WEIGHT_DECAY, SMOOTHING = 64, 2e-3, 0.05, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the small SLaK that the demo converts.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="a .safetensors file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)  # small layers gain little from more, and sums then come out the same on every machine
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    data = digits()
    model = SLaK(**CONFIG, drop_path_rate=0.1)
    train(model, data, args.epochs)

    predicted, crippled = predict(model, data.images), predict(without_strips(model), data.images)
    total, right = len(data.labels), int((predicted == data.labels).sum())
    still_right, changed = int((crippled == data.labels).sum()), int((crippled != predicted).sum())
    print(f"held-out digits: {right} of {total} right ({right / total:.2%})")
    print(f"with the strips set to zero: {still_right} of {total} right, {changed} answers changed")
    facts = {
        "config": CONFIG,
        "preprocessing": PREPROCESSING,
        "held_out": {"right": right, "of": total, "right_without_strips": still_right},
    }
    metadata = {"format": "pt", **{key: json.dumps(value) for key, value in facts.items()}}
    save_file(model.state_dict(), args.output, metadata=metadata)
    print(f"wrote {args.output} ({args.output.stat().st_size / 1e6:.2f} MB)")


def train(model: SLaK, data: Digits, epochs: int) -> None:
    """AdamW; the learning rate rises and falls once; every digit is moved and turned a little, each time anew."""
    steps = math.ceil(len(data.train_labels) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, epochs=epochs, steps_per_epoch=steps)
    for epoch in range(epochs):
        model.train()
        start, losses = time.perf_counter(), []
        for batch in torch.randperm(len(data.train_labels)).split(BATCH):
            logits = model(jitter(data.train_images[batch]))
            loss = F.cross_entropy(logits, data.train_labels[batch], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        right = (predict(model, data.images) == data.labels).float().mean().item()
        seconds = time.perf_counter() - start
        print(
            f"epoch {epoch + 1:2d} of {epochs}: loss {sum(losses) / steps:.4f}, held out {right:.2%}, {seconds:.1f} s"
        )


def jitter(images: Tensor) -> Tensor:
    """Each image (B, 1, S, S) turned by up to 12 degrees, scaled and moved by up to a tenth."""
    angle, scale, *shift = torch.empty(4, len(images)).uniform_(-1, 1)
    turn, size = angle * math.radians(12), 1 + 0.1 * scale
    cos, sin = size * turn.cos(), size * turn.sin()
    rows = [torch.stack([cos, -sin, 0.1 * shift[0]], 1), torch.stack([sin, cos, 0.1 * shift[1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    background = images.amin()
    return F.grid_sample(images - background, grid, align_corners=False) + background


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(batch).argmax(1) for batch in images.split(BATCH)])


if __name__ == "__main__":
    main()
