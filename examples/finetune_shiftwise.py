"""From SLaK to the paper's module: calibrate on a few images, then distil.

`convert(model)` keeps the function. With `SWConfig(mode="shiftwise")` each block becomes the module of the
ShiftwiseConv paper instead: one bank of 3 x 3 filters for both strips, four random orders, ghost channels. It cannot
make every kernel. Fitted to the original's responses on some images, without labels, it keeps most of the accuracy at
once; a short training towards the original's answers, without labels too, does the rest. Here with the small SLaK that
this project trained on scikit-learn's digits.

    python examples/finetune_shiftwise.py --images 32 --epochs 3
"""

from __future__ import annotations

import argparse
import time

import torch
from digits import Digits, digits, load_trained
from torch import nn

import sw_transplant as sw
from sw_transplant.surgery.calibration import Calibration
from sw_transplant.surgery.distill import distill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=32, help="how many are calibrated on, without labels")
    parser.add_argument("--epochs", type=int, default=3, help="of distillation, on all training images")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--tile", type=int, default=3, help="side of the filters")
    parser.add_argument("--ghost", type=float, default=0.23, help="fraction of channels that bypass")
    parser.add_argument("--swaps", type=int, default=150, help="exchanges of two tiles' places tried in each channel")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)  # the maps are small: threads would only wait for each other
    trained = load_trained()
    data = digits(trained.preprocessing)
    config = sw.SWConfig(mode="shiftwise", tile=arguments.tile, ghost=arguments.ghost)
    few = data.train_images[: arguments.images]

    print(f"held-out digits right, of {len(data.labels)}:")
    start = time.perf_counter()

    def show(what: str, model: nn.Module) -> None:
        nonlocal start
        seconds = time.perf_counter() - start
        print(f"  {what:<34} {right(model, data)}   ({seconds:.0f} s)", flush=True)
        start = time.perf_counter()

    show("SLaK", trained.model)
    show("converted by kernels alone", sw.convert(trained.model, config))
    show("calibrated", sw.convert(trained.model, config, calibration=Calibration(few, swaps=arguments.swaps)))
    calibration = Calibration(few, refit=True, swaps=arguments.swaps)
    model = sw.convert(trained.model, config, calibration=calibration)
    show("calibrated, linear layers refitted", model)

    def after_epoch(epoch: int, _: float) -> None:
        show(f"distilled, epoch {epoch}", model)

    settings = {"epochs": arguments.epochs, "learning_rate": arguments.learning_rate, "after_epoch": after_epoch}
    distill(model, trained.model, data.train_images, **settings)
    merged = sw.merge(model.eval())
    print(f"  merged to plain convolutions {right(merged, data)}\n")
    print(calibration.report)
    print(sw.summary(model))


@torch.no_grad()
def right(model: nn.Module, data: Digits) -> int:
    model.eval()
    batches = zip(data.images.split(75), data.labels.split(75), strict=True)
    return sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)


if __name__ == "__main__":
    main()
