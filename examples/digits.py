"""The handwritten digits that come with scikit-learn, and a small SLaK for them: what the examples share."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from sw_transplant.models import SLaK, load_checkpoint

WEIGHTS = Path(__file__).with_name("digits_slak.safetensors")

# Every kernel of the published SLaK, on fewer and narrower layers. The layer scale starts at 1, not at the published
# 1e-6: after a short training the blocks with the large kernels would still be next to silent otherwise.
CONFIG: dict[str, Any] = {
    "in_chans": 1,
    "num_classes": 10,
    "depths": [1, 1, 2, 1],
    "dims": [16, 32, 48, 64],
    "kernel_size": [51, 49, 47, 13, 5],
    "layer_scale_init_value": 1.0,
}
# The images are 8 x 8. At 64 x 64 the four stages see maps of 16, 8, 4 and 2 positions a side, so that a kernel 51 long
# reaches from any position to every other of its row or column.
PREPROCESSING: dict[str, Any] = {"size": 64, "mean": 0.5, "std": 0.5}


class Digits(NamedTuple):
    """Images (N, 1, S, S) float32 and labels (N,) int64, to train on and held out."""

    train_images: Tensor
    train_labels: Tensor
    images: Tensor
    labels: Tensor


def digits(preprocessing: dict[str, Any] = PREPROCESSING) -> Digits:
    """The 1797 digits, a quarter of every class held out: always the same ones."""
    data = load_digits()
    numbers = train_test_split(range(len(data.target)), test_size=0.25, stratify=data.target, random_state=0)
    images, labels = prepare(data.images, **preprocessing), torch.as_tensor(data.target).long()
    train, held_out = (torch.tensor(part) for part in numbers)
    return Digits(images[train], labels[train], images[held_out], labels[held_out])


def prepare(pixels: Any, size: int | tuple[int, int], mean: float, std: float) -> Tensor:
    """Arrays (N, 8, 8) of 0 to 16 as normalised images (N, 1, H, W); `size` is (H, W), or one number for both."""
    x = torch.as_tensor(pixels, dtype=torch.float32)[:, None] / 16
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return (x - mean) / std


class Trained(NamedTuple):
    """A SLaK with trained weights, and how its images are prepared."""

    model: SLaK
    preprocessing: dict[str, Any]


def load_trained(path: Path = WEIGHTS) -> Trained:
    """Reads what ``train_digits_slak.py`` wrote."""
    with safe_open(path, framework="pt") as file:
        facts = {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}
    model = SLaK(**facts["config"])
    load_checkpoint(model, path)
    return Trained(model.eval(), facts["preprocessing"])


@torch.no_grad()
def without_strips(model: SLaK) -> SLaK:
    """A copy whose strips, 51x5 and so on, are zero; the 5x5 kernels beside them stay. Does the network need strips?"""
    crippled = copy.deepcopy(model)
    for layer in crippled.modules():
        if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 5:
            layer.weight.zero_()
    return crippled
