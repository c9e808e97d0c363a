"""What a model takes as input, and labelled images made ready for it: a folder of class folders, or an ``.npz``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ArrayImages", "FolderImages", "ModelInput", "load_images"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_SHARE = 224 / 256  # of the resized image, the habit for ImageNet
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class ModelInput:
    """The images a model takes.

    Args:
        shape: (C, H, W) of one image.
        mean, std: per channel, subtracted from and divided out of pixels scaled to 0..1; C numbers each.
        num_classes: the number of classes the model tells apart, where known.
        timm_config: timm's ``pretrained_cfg`` of the model; where set, timm's own preprocessing is used.
        processor: folder with a Hugging Face ``preprocessor_config.json``; where set, that image processor is used.

    Raises:
        ValueError: the shape is not three positive numbers, or mean and std do not have one number per channel.
    """

    shape: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    num_classes: int | None = None
    timm_config: Mapping[str, Any] | None = None
    processor: str | Path | None = None

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"ModelInput: shape is {self.shape}; expected three positive numbers (C, H, W).")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.shape[0]:
                raise ValueError(
                    f"ModelInput: {name} has {len(values)} numbers and the images have {self.shape[0]} channels; "
                    f"give one number per channel."
                )

    @classmethod
    def of(cls, model: nn.Module, processor: str | Path | None = None) -> ModelInput:
        """Read off a model what it takes.

        timm's ``pretrained_cfg`` / ``default_cfg`` (of the model, of the timm model inside it, or of its Hugging Face
        config) comes first, then the Hugging Face config's ``image_size`` and ``num_channels`` (or those of its
        backbone), then 224 x 224 with the channels of the first convolution. Nothing is downloaded.

        Args:
            model: any vision model.
            processor: folder with a ``preprocessor_config.json``, which then decides size, mean and std.

        Raises:
            ValueError: ``processor`` holds no ``preprocessor_config.json``, or one that is not an image processor's.
        """
        config = getattr(model, "config", None)
        timm_config = _timm_config(model, config)
        size: Any = None
        channels: int | None = None
        if timm_config is not None:
            channels, *size = timm_config["input_size"]
            # Other channels than the published ones (in_chans=1) show in the stem alone; a stem of four times as many
            # channels or more rearranges pixels into channels first (space to depth, DCT).
            stem = _first_conv_channels(model, channels)
            channels = stem if stem < 4 * channels else channels
        else:
            for owner in (config, *(getattr(config, key, None) for key in ("backbone_config", "vision_config"))):
                size = size or _setting(owner, "image_size")
                channels = channels or _setting(owner, "num_channels")
        height, width = _pair(size or 224)
        channels = channels or _first_conv_channels(model, 3)
        settings = dict(timm_config or {})
        mean, std = settings.get("mean", IMAGENET_MEAN), settings.get("std", IMAGENET_STD)
        if processor is not None:
            (height, width), mean, std = _read_processor(Path(processor), (height, width))
        return cls(
            shape=(channels, height, width),
            mean=_per_channel(mean, channels),
            std=_per_channel(std, channels),
            num_classes=_num_classes(model, config),
            timm_config=timm_config,
            processor=processor,
        )

    def transform(self) -> Callable[[Image], Tensor]:
        """What makes one PIL image a float32 (C, H, W): Hugging Face's, timm's, or plain resize, crop and normalise."""
        if self.processor is not None:
            from transformers import AutoImageProcessor

            return partial(_processed, AutoImageProcessor.from_pretrained(str(self.processor), local_files_only=True))
        if self.timm_config is not None:
            from timm.data.config import resolve_data_config
            from timm.data.transforms_factory import create_transform

            settings = resolve_data_config(pretrained_cfg=dict(self.timm_config))
            settings.update(input_size=self.shape, mean=self.mean, std=self.std)
            return create_transform(**settings, is_training=False)
        return partial(_resize_crop_normalise, self)


class FolderImages(Dataset[tuple[Tensor, int]]):
    """Images in class folders, each as a float32 (C, H, W) with its class.

    Args:
        files: (path, class) of each image.
        model_input: what the images are made ready for.

    Raises:
        NotImplementedError: the model takes neither one channel nor three.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], model_input: ModelInput) -> None:
        modes = {1: "L", 3: "RGB"}
        if model_input.shape[0] not in modes:
            raise NotImplementedError(
                f"load_images: the model takes {model_input.shape[0]} channels; image files give 1 or 3. "
                f"Store the images as float32 arrays in an .npz instead."
            )
        self.files = list(files)
        self.mode = modes[model_input.shape[0]]
        self.transform = model_input.transform()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        path, label = self.files[index]
        with Image.open(path) as image:
            return self.transform(image.convert(self.mode)), label


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory; iterating gives batches, as often as wanted, each made ready only when its turn comes.

    Args:
        images: (N, H, W, C) uint8, which are scaled to 0..1, resized and normalised; or (N, C, H, W) float32, which are
            ready for the model and left as they are.
        labels: (N,) int64, or None; then the batches are images alone.
        model_input: what the images are made ready for.
        batch_size: images in a batch; the last may be smaller.
    """

    images: Tensor
    labels: Tensor | None
    model_input: ModelInput
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor] | Tensor]:
        for start in range(0, len(self.images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            images = self._ready(self.images[batch])
            yield images if self.labels is None else (images, self.labels[batch])

    def _ready(self, images: Tensor) -> Tensor:
        if images.dtype == torch.float32:
            return images
        x = images.permute(0, 3, 1, 2).float() / 255
        if x.shape[2:] != self.model_input.shape[1:]:
            x = F.interpolate(x, size=self.model_input.shape[1:], mode="bilinear", align_corners=False)
        return _normalise(x, self.model_input.mean, self.model_input.std)


def load_images(
    path: str | Path,
    model_input: ModelInput | None = None,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    classes: Sequence[str] | None = None,
    workers: int = 0,
) -> DataLoader[tuple[Tensor, int]] | ArrayImages:
    """Labelled images from disk, in batches that :func:`sw_transplant.verify` and any evaluation loop take.

    Args:
        path: a folder with one folder of image files per class, such as ImageNet's ``val`` (a class's number is its
            place among the sorted names); or an ``.npz`` with ``images``, (N, H, W, C) uint8 or (N, C, H, W) float32,
            optionally ``labels`` (N,), and optionally ``mean`` and ``std`` (C,) that replace the model's.
            uint8 images are scaled to 0..1, resized (bilinear) to the model's size and normalised; float32 images are
            taken as they are.
        model_input: what the model takes: ``ModelInput.of(model)``; None: 3 x 224 x 224 with ImageNet's mean and std.
        batch_size: images in a batch.
        limit: use this many images at most, spread evenly over all of them (and so over the classes of a folder).
        classes: the names of the class folders in the order of the model's outputs, where that is not the order of the
            names, or where the folders are only some of the classes.
        workers: processes that read image files; 0 reads in this one.

    Returns:
        An iterable, to be used as often as wanted, of (images (B, C, H, W) float32, labels (B,) int64); of images alone
        for an ``.npz`` without labels.

    Raises:
        ValueError: nothing at ``path``, no images in it, an array of a wrong shape or dtype, a label that the model has
            no class for, or a number of class folders that is not the model's number of classes.
    """
    path, model_input = Path(path), model_input or ModelInput()
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"load_images: {name} is {value}; it must be at least 1.")
    if path.is_dir():
        files = _spread(_class_files(path, model_input, classes), limit)
        return DataLoader(FolderImages(files, model_input), batch_size=batch_size, num_workers=workers)
    if not path.is_file():
        raise ValueError(f"load_images: there is no file or folder {path}; give a folder of class folders or an .npz.")
    if path.suffix != ".npz":
        raise ValueError(
            f"load_images: {path} is neither a folder nor an .npz; give a folder of class folders or an .npz."
        )
    return _load_npz(path, model_input, batch_size, limit)


def _spread(items: list[Any], limit: int | None) -> list[Any]:
    count = len(items) if limit is None else min(limit, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _class_files(folder: Path, model_input: ModelInput, classes: Sequence[str] | None) -> list[tuple[Path, int]]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    order = names if classes is None else list(classes)
    if unknown := sorted(set(names) - set(order)):
        raise ValueError(f"load_images: the folders {unknown} of {folder} are not in classes; name every folder there.")
    files = [
        (file, order.index(name))
        for name in names
        for file in sorted((folder / name).rglob("*"))
        if file.suffix.lower() in SUFFIXES and file.is_file()
    ]
    if not files:
        raise ValueError(
            f"load_images: no images in the class folders of {folder} ({len(names)} of them); expected one folder per "
            f"class with files such as .jpg or .png."
        )
    if model_input.num_classes not in (None, len(order)):
        raise ValueError(
            f"load_images: {folder} has {len(order)} classes and the model has {model_input.num_classes}, so they "
            f"cannot be numbered; give the names of the model's classes in order as classes=[...]."
        )
    return files


def _load_npz(path: Path, model_input: ModelInput, batch_size: int, limit: int | None) -> ArrayImages:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in ("images", "labels", "mean", "std") if key in archive.files}
    except Exception as error:  # numpy raises whatever the zip, the header or a pickled object run into
        raise ValueError(f"load_images: {path} cannot be read as an .npz of plain arrays: {error}") from error
    if "images" not in arrays:
        raise ValueError(
            f"load_images: {path} has no array 'images'; save one with numpy.savez(path, images=..., labels=...)."
        )
    images, channels = arrays["images"], model_input.shape[0]
    axis = {np.dtype(np.uint8): 3, np.dtype(np.float32): 1}.get(images.dtype)
    if axis is None or images.ndim != 4 or images.shape[axis] != channels or 0 in images.shape:
        raise ValueError(
            f"load_images: 'images' of {path} is {images.dtype} of shape {images.shape}; expected one image or "
            f"more as uint8 (N, H, W, {channels}) or float32 (N, {channels}, H, W)."
        )
    changes: dict[str, Any] = {}
    for key in ("mean", "std"):
        if key in arrays:
            if arrays[key].shape != (channels,) or axis == 1:
                raise ValueError(
                    f"load_images: {key!r} of {path} has shape {arrays[key].shape} beside {images.dtype} images; "
                    f"expected ({channels},) beside uint8 images, and none beside float32 ones, which are not changed."
                )
            changes[key] = tuple(float(value) for value in arrays[key])
    labels = arrays.get("labels")
    if labels is not None:
        _check_labels(path, labels, len(images), model_input.num_classes)
    chosen = np.asarray(_spread(list(range(len(images))), limit))
    return ArrayImages(
        images=torch.from_numpy(images[chosen]),
        labels=None if labels is None else torch.from_numpy(labels[chosen].astype(np.int64)),
        model_input=replace(model_input, **changes),
        batch_size=batch_size,
    )


def _check_labels(path: Path, labels: Any, images: int, num_classes: int | None) -> None:
    if labels.shape != (images,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"load_images: 'labels' of {path} is {labels.dtype} of shape {labels.shape}; expected one whole number per "
            f"image, shape ({images},)."
        )
    if labels.min() < 0 or (num_classes is not None and labels.max() >= num_classes):
        below = "" if num_classes is None else f", below the model's {num_classes} classes"
        raise ValueError(
            f"load_images: 'labels' of {path} run from {labels.min()} to {labels.max()}; expected 0 or more"
            f"{below}. Number the classes as the model does."
        )


def _timm_config(model: nn.Module, config: Any) -> dict[str, Any] | None:
    owners = [model, config]
    if _setting(config, "image_size") is None:
        owners += list(model.modules())  # a timm model inside a wrapper
    for owner in owners:
        for name in ("pretrained_cfg", "default_cfg"):
            found = getattr(owner, name, None)
            if is_dataclass(found) and not isinstance(found, type):
                found = asdict(found)
            if isinstance(found, Mapping) and len(found.get("input_size") or ()) == 3:
                return dict(found)
    return None


def _setting(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        size = (size.get("height", edge), size.get("width", edge))
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(height), int(width)


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """The values themselves, or their mean in every channel where the model has other channels than theirs."""
    if len(values) == channels:
        return tuple(float(value) for value in values)
    return (float(sum(values) / len(values)),) * channels


def _first_conv_channels(model: nn.Module, otherwise: int) -> int:
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), otherwise)


def _num_classes(model: nn.Module, config: Any) -> int | None:
    # Every Hugging Face config has num_labels (2 unless told); it means something for classifiers only.
    classifier = "ForImageClassification" in type(model).__name__
    count = getattr(config, "num_labels", None) if classifier else getattr(model, "num_classes", None)
    return count if isinstance(count, int) and count > 0 else None


def _read_processor(folder: Path, size: tuple[int, int]) -> tuple[tuple[int, int], Sequence[float], Sequence[float]]:
    """(H, W), mean and std of a Hugging Face image processor's ``preprocessor_config.json``."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        raise ValueError(
            f"ModelInput: there is no {file}; give the folder that holds the model's preprocessor_config.json."
        )
    settings = json.loads(file.read_text(encoding="utf-8"))
    final = (settings.get("do_center_crop") and settings.get("crop_size")) or settings.get("size") or size
    try:
        size = _pair(final)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"ModelInput: the image size {final!r} of {file} is not understood; expected a number, a height and width, "
            f"or a shortest_edge."
        ) from error
    if not settings.get("do_normalize", True):
        return size, (0.0,) * 3, (1.0,) * 3
    return size, settings.get("image_mean", IMAGENET_MEAN), settings.get("image_std", IMAGENET_STD)


def _processed(processor: Any, image: Image) -> Tensor:
    pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    return pixels


def _normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return (x - x.new_tensor(mean).view(-1, 1, 1)) / x.new_tensor(std).view(-1, 1, 1)


def _resize_crop_normalise(model_input: ModelInput, image: Image) -> Tensor:
    from PIL.Image import Resampling

    _, height, width = model_input.shape
    least = int(width / CROP_SHARE), int(height / CROP_SHARE)  # PIL's order: width, height
    scale = max(least[0] / image.width, least[1] / image.height)
    resized = image.resize(
        (max(least[0], int(image.width * scale)), max(least[1], int(image.height * scale))), Resampling.BILINEAR
    )
    left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
    pixels = np.array(resized.crop((left, top, left + width, top + height)), dtype=np.float32)  # (H, W) or (H, W, C)
    x = torch.from_numpy(pixels).reshape(height, width, -1).permute(2, 0, 1) / 255
    return _normalise(x.contiguous(), model_input.mean, model_input.std)
