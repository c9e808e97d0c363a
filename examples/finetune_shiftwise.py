"""From SLaK to the paper's module: convert approximately, then fine-tune.

`convert(model)` keeps the function. With `SWConfig(mode="shiftwise")` each block becomes the module of the
ShiftwiseConv paper instead: one bank of 3 x 3 filters for both strips, four random orders, ghost channels. It cannot
make every kernel; it starts from the closest that it can make, and a short training does the rest. Here with the small
SLaK that this project trained on scikit-learn's digits.

    python examples/finetune_shiftwise.py --epochs 3
"""

from __future__ import annotations

import argparse
import time

import torch
from digits import Digits, digits, load_trained
from torch import nn
from torch.nn import functional as F

import sw_transplant as sw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--tile", type=int, default=3, help="side of the filters")
    parser.add_argument("--ghost", type=float, default=0.23, help="fraction of channels that bypass")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)  # the maps are small: threads would only wait for each other
    trained = load_trained()
    data = digits(trained.preprocessing)
    model = sw.convert(trained.model, sw.SWConfig(mode="shiftwise", tile=arguments.tile, ghost=arguments.ghost))
    print(sw.summary(model))
    print(f"\nheld-out digits right, of {len(data.labels)}:")
    print(f"  SLaK                       {right(trained.model, data)}")
    print(f"  converted, not yet trained {right(model, data)}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), arguments.learning_rate)
    start = time.perf_counter()
    for epoch in range(1, arguments.epochs + 1):
        train(model, data, optimizer, seed=epoch)
        seconds = time.perf_counter() - start
        print(f"  after epoch {epoch}              {right(model, data)}   ({seconds:.0f} s)", flush=True)
    merged = sw.merge(model)
    print(f"  merged to plain convolutions {right(merged, data)}")


def train(model: nn.Module, data: Digits, optimizer: torch.optim.Optimizer, seed: int) -> None:
    model.train()
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(seed))
    for batch in order.split(64):
        loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def right(model: nn.Module, data: Digits) -> int:
    model.eval()
    batches = zip(data.images.split(75), data.labels.split(75), strict=True)
    return sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)


if __name__ == "__main__":
    main()
