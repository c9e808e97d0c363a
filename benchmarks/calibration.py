"""What calibration keeps of a trained network's accuracy, without training and with a little.

    python benchmarks/calibration.py --json benchmarks/results/calibration.json
    python benchmarks/calibration.py --rows "50 images" digits --halves A --seeds 0

A SLaK trained on CIFAR-10 (`--data`: the folder with `slak_cifar10.safetensors` and `cifar10_test_1000.npz`) is
converted to the paper's modules. Of its 1000 images one half calibrates, without labels, and the other is counted; then
the halves change places. A seed chooses which images of the calibrating half are used, and the conversion's seed. The
small SLaK of examples/digits.py is calibrated on training images and counted on the 450 that it was not trained on.
Settings are the defaults of `Calibration`, and for distillation those of `distilled`; they were chosen on calibrating
halves alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from report import Report, environment, parser
from safetensors.torch import load_file
from torch import Tensor, nn

import sw_transplant as sw
from sw_transplant.models import SLaK
from sw_transplant.surgery.calibration import Calibration
from sw_transplant.surgery.distill import distill

ROOT = Path(__file__).resolve().parents[1]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
COLUMNS = {"row": 34, "half": 4, "seed": 4, "right": 5, "of": 4, "original": 8, "train mode": 10, "seconds": 7}


class Task(NamedTuple):
    """A trained network, images to calibrate on, and others with labels to count on."""

    model: nn.Module
    images: Tensor
    counted: Tensor
    labels: Tensor


def cifar(folder: Path, half: str) -> Task:
    """The SLaK for CIFAR-10. Each half has 50 images of every class."""
    model = SLaK(depths=(2, 2, 4, 2), dims=(24, 48, 96, 160), kernel_size=(51, 49, 47, 13, 5), num_classes=10).eval()
    model.load_state_dict(load_file(folder / "slak_cifar10.safetensors"))
    with np.load(folder / "cifar10_test_1000.npz") as file:
        pixels = torch.from_numpy(file["images"]).permute(0, 3, 1, 2).float() / 255
        labels = torch.from_numpy(file["labels"]).long()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    images = (F.interpolate(pixels, size=(96, 96), mode="bilinear", align_corners=False) - mean) / std
    generator, halves = torch.Generator().manual_seed(1), ([], [])  # type: ignore[var-annotated]
    for label in range(10):
        of_class = (labels == label).nonzero().flatten()
        of_class = of_class[torch.randperm(len(of_class), generator=generator)]
        halves[0].append(of_class[:50])
        halves[1].append(of_class[50:])
    calibrating, counted = (torch.cat(part) for part in (halves if half == "A" else halves[::-1]))
    counted = counted[torch.randperm(len(counted), generator=generator)]  # so that batches have all classes
    return Task(model, images[calibrating], images[counted], labels[counted])


def handwritten() -> Task:
    """The SLaK of the examples."""
    sys.path.insert(0, str(ROOT / "examples"))
    from digits import digits, load_trained

    trained = load_trained()
    data = digits(trained.preprocessing)
    return Task(trained.model, data.train_images, data.images, data.labels)


@torch.no_grad()
def right(model: nn.Module, task: Task, *, training: bool = False) -> int:
    """How many images get their class; in train mode, every BatchNorm goes by a batch of 50."""
    model.train(training)
    size = 50 if training else 10
    batches = zip(task.counted.split(size), task.labels.split(size), strict=True)
    count = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    model.eval()
    return count


def some(task: Task, count: int, seed: int) -> Tensor:
    """So many images of those that calibrate, chosen by a seed."""
    order = torch.randperm(len(task.images), generator=torch.Generator().manual_seed(seed))
    return task.images[order[:count]]


def other_views(images: Tensor) -> Tensor:
    """Half of them mirrored, each batch moved by up to 8 pixels, every second with up to half of another in it."""
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    images = torch.where(mirrored, images.flip(3), images)
    down, across = torch.randint(0, 17, (2,)).tolist()
    height, width = images.shape[2:]
    images = F.pad(images, (8, 8, 8, 8), mode="reflect")[:, :, down : down + height, across : across + width]
    share = torch.rand(len(images), 1, 1, 1) / 2 * (torch.rand(len(images), 1, 1, 1) < 0.5)
    return images.lerp(images[torch.randperm(len(images))], share)


def config(seed: int, **changes: Any) -> sw.SWConfig:
    return sw.SWConfig(mode="shiftwise", seed=123 + seed, **changes)


def by_kernels(task: Task, seed: int, **changes: Any) -> nn.Module:
    return sw.convert(task.model, config(seed, **changes))


def calibrated(
    task: Task, seed: int, count: int, *, ghosts: dict[str, Any] | None = None, **settings: Any
) -> nn.Module:
    images = Calibration(some(task, count, seed), held_out=0.0, progress=False, **settings)
    return sw.convert(task.model, config(seed, **(ghosts or {})), calibration=images)


def from_nothing(task: Task, seed: int) -> nn.Module:
    size = tuple(task.images.shape[1:])
    images = Calibration("synthetic", input_size=size, held_out=0.0, progress=False)
    return sw.convert(task.model, config(seed), calibration=images)


def distilled(task: Task, seed: int, epochs: int = 10) -> nn.Module:
    student = calibrated(task, seed, 200, refit=True)
    return distill(
        student,
        task.model,
        task.images,
        epochs=epochs,
        learning_rate=1e-4,
        batch_statistics=False,
        augment=other_views,
        seed=seed,
        progress=False,
    )


GLOBAL = {"ghost_budget": "global"}
ROWS: dict[str, Callable[[Task, int], nn.Module]] = {
    "kernels": by_kernels,
    "kernels, ghost 0": lambda task, seed: by_kernels(task, seed, ghost=0.0),
    "50 images, drawn orders": lambda task, seed: calibrated(task, seed, 50, candidates=1, swaps=0),
    "50 images, each channel alone": lambda task, seed: calibrated(task, seed, 50, mix=0.0),
    "50 images": lambda task, seed: calibrated(task, seed, 50),
    "50 images, one budget": lambda task, seed: calibrated(task, seed, 50, ghosts=GLOBAL),
    "50 images, one budget, refit": lambda task, seed: calibrated(task, seed, 50, ghosts=GLOBAL, refit=True),
    "50 images, refit": lambda task, seed: calibrated(task, seed, 50, refit=True),
    "50 images, ghost 0": lambda task, seed: calibrated(task, seed, 50, ghosts={"ghost": 0.0}),
    "50 images, ghost 0, refit": lambda task, seed: calibrated(task, seed, 50, ghosts={"ghost": 0.0}, refit=True),
    "500 images": lambda task, seed: calibrated(task, seed, 500),
    "500 images, refit": lambda task, seed: calibrated(task, seed, 500, refit=True),
    "no images": from_nothing,
    "500 images, distilled": distilled,
    "digits, kernels": by_kernels,
    "digits, 32 images": lambda task, seed: calibrated(task, seed, 32),
}


def measure(task: Task, make: Callable[[Task, int], nn.Module], seed: int) -> dict[str, Any]:
    begin = time.perf_counter()
    model = make(task, seed).eval()
    seconds = time.perf_counter() - begin
    return {
        "right": right(model, task),
        "of": len(task.labels),
        "original": right(task.model, task),
        "train mode": right(model, task, training=True),
        "seconds": seconds,
    }


def main() -> None:
    options = parser(__doc__, repeats=(1, 1), seconds=None, device=False)
    options.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the CIFAR network"
    )
    options.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    options.add_argument("--halves", nargs="+", choices=["A", "B"], default=["A", "B"], help="the one that calibrates")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = options.parse_args()
    torch.set_num_threads(1)  # the maps are small: threads would only wait for each other
    head = {"environment": environment("calibration.py", sys.argv[1:], torch.device("cpu"))}
    report = Report(COLUMNS, head, arguments.json, arguments.minutes)
    for seed in arguments.seeds:
        for name in arguments.rows:
            digit = name.startswith("digits")
            for half in ["-"] if digit else arguments.halves:
                task = handwritten() if digit else cifar(arguments.data, half)
                known = {"row": name, "half": half, "seed": seed}
                report.measure(known, lambda task=task, name=name, seed=seed: [measure(task, ROWS[name], seed)])


if __name__ == "__main__":
    main()
