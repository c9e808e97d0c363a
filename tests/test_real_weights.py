"""Trained networks and labelled images: after conversion every single image gets the class it had before.

Where that takes long they look at every tenth image; the exhaustive ones look at all 1000.
"""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from sw_transplant import SWConfig, convert, load, merge, save
from sw_transplant.models import SLaK
from tests.acceptance import shiftwise_layers, with_form
from tests.sampling import sample

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH = 5  # small enough for the caches: several times faster on a CPU than 50


@dataclass(frozen=True)
class Task:
    """A trained model with labelled images.

    ``read`` gives the images and labels, all 1000 or every so manieth; ``right`` is what the original gets right of
    them, in float32 on a CPU; ``layers`` is the number of converted layers for each ``min_kernel``; ``rebuild`` makes
    the architecture, untrained.
    """

    model: nn.Module
    rebuild: Callable[[], nn.Module]
    read: Callable[[int], tuple[Tensor, Tensor]]
    right: dict[int, int]
    layers: dict[int, int]
    answers: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def original(self, every: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels, and the original's logits."""
        if every not in self.answers:
            images, labels = self.read(every)
            self.answers[every] = images, labels, logits_of(self.model, images)
        return self.answers[every]

    def check(self, converted: nn.Module, every: int) -> None:
        """Same classes for all images, and the same logits to 1e-4."""
        images, labels, expected = self.original(every)
        got = logits_of(converted, images)
        assert len(got) == 1000 // every
        assert torch.equal(got.argmax(1), expected.argmax(1))
        for logits in (expected, got):
            assert int((logits.argmax(1) == labels).sum()) == self.right[every]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(BATCH)])


def from_zip(path: Path, crop: Callable[[Image.Image], Image.Image], every: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, S, S) in -1 to 1, and their ImageNet-1k labels: the rank of the name's synset."""
    synsets = Path(timm.__file__).parent / "data" / "_info" / "imagenet_synsets.txt"
    label_of = {synset: label for label, synset in enumerate(synsets.read_text().split())}
    images, labels = [], []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".jpg"))[::every]:
            with archive.open(name) as file:
                pixels = np.asarray(crop(Image.open(file).convert("RGB")), dtype=np.float32)
            images.append(torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1))
            labels.append(label_of[Path(name).name.split("_")[0]])
    return torch.stack(images), torch.tensor(labels)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


# ---- the three networks ---------------------------------------------------------------------------------------------


def build_slak() -> nn.Module:
    return SLaK(depths=(2, 2, 4, 2), dims=(24, 48, 96, 160), kernel_size=(51, 49, 47, 13, 5), num_classes=10).eval()


@pytest.fixture(scope="module")
def cifar(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "data" / "cifar10_test_1000.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def slak(shared: Path, cifar: dict[str, np.ndarray]) -> Task:
    model = build_slak()
    model.load_state_dict(load_file(shared / "data" / "slak_cifar10.safetensors"), strict=True)
    pixels = torch.from_numpy(cifar["images"]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (CIFAR_MEAN, CIFAR_STD))
    images = (F.interpolate(pixels, size=(96, 96), mode="bilinear", align_corners=False) - mean) / std
    labels = torch.from_numpy(cifar["labels"]).long()
    return Task(model, build_slak, lambda every: (images[::every], labels[::every]), {1: 834, 10: 85}, {7: 10})


@pytest.fixture(scope="module")
def mcunet(shared: Path) -> Task:
    folder = shared / "data" / "mcunet"
    spec = importlib.util.spec_from_file_location("mcunet", folder / "mcunet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    files = folder / "mcunet-320kb-1mb_imagenet.json", folder / "mcunet-320kb-1mb_imagenet.pth"

    def crop(image: Image.Image) -> Image.Image:
        return center_crop(image.resize((201, 201), Image.Resampling.BILINEAR), 176)

    def build() -> nn.Module:
        return module.Net(json.loads(files[0].read_text())).eval()

    read = partial(from_zip, shared / "data" / "imagenet_sample_1000_256.zip", crop)
    return Task(module.load(*files), build, read, {1: 703, 10: 69}, {7: 6, 5: 12})


@pytest.fixture(scope="module")
def lite0(shared: Path) -> Task:
    def build() -> nn.Module:
        return timm.create_model("tf_efficientnet_lite0").eval()

    model = build()
    weights = torch.load(shared / "data" / "tf_efficientnet_lite0.pth", map_location="cpu", weights_only=True)
    names = list(model.state_dict())
    model.load_state_dict(dict(zip(names, weights.values(), strict=True)), strict=True)
    read = partial(from_zip, shared / "data" / "imagenet_sample_1000_256.zip", partial(center_crop, size=224))
    return Task(model, build, read, {1: 872, 10: 85}, {5: 9})


# ---- what must hold -------------------------------------------------------------------------------------------------


def saved_and_loaded(task: Task, converted: nn.Module, folder: Path) -> nn.Module:
    save(with_form(converted, "auto"), folder)
    loaded = load(task.rebuild(), folder)
    assert shiftwise_layers(loaded).keys() == shiftwise_layers(converted).keys()
    return loaded


def merged(task: Task, converted: nn.Module, folder: Path) -> nn.Module:
    plain = merge(converted)
    assert not shiftwise_layers(plain)
    return plain


WAYS: dict[str, Callable[[Task, nn.Module, Path], nn.Module]] = {
    "assembled": lambda task, converted, folder: with_form(converted, "assembled"),
    "shift": lambda task, converted, folder: with_form(converted, "shift"),
    "saved and loaded": saved_and_loaded,
    "merged": merged,
}
NETWORKS = [("slak", 7), ("mcunet", 5), ("mcunet", 7), ("lite0", 5)]
CASES = [(*network, every, way) for network in NETWORKS for every in (1, 10) for way in WAYS]
QUICK = [
    *[("slak", 7, 10, way) for way in WAYS],
    ("mcunet", 5, 10, "assembled"),
    ("mcunet", 5, 10, "merged"),
]


def test_slak_gives_the_recorded_logits(slak: Task, cifar: dict[str, np.ndarray]) -> None:
    _, _, logits = slak.original(1)
    torch.testing.assert_close(logits, torch.from_numpy(cifar["logits"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "min_kernel", "every", "way"), sample(CASES, QUICK))
def test_every_image_gets_the_same_class(
    name: str, min_kernel: int, every: int, way: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    task: Task = request.getfixturevalue(name)
    converted = convert(task.model, SWConfig(min_kernel=min_kernel))
    assert len(shiftwise_layers(converted)) == task.layers[min_kernel]
    task.check(WAYS[way](task, converted, tmp_path), every)
