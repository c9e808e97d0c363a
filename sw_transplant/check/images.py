"""Images made ready for a model: a folder of class folders, a folder of images, or an ``.npz``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from sw_transplant.check.model_input import ModelInput, normalise

File = tuple[Path, int | None]
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class FolderImages(Dataset[Any]):
    """Image files, each as a float32 (C, H, W), with its class where it has one.

    Args:
        files: (path, class) of each image; the class None for all of them or for none.
        model_input: what the images are made ready for.
        resize: make them the model's size; else they are only scaled to 0..1 and normalised.

    Raises:
        NotImplementedError: the model takes neither one channel nor three.
    """

    def __init__(self, files: Sequence[File], model_input: ModelInput, *, resize: bool = True) -> None:
        modes = {1: "L", 3: "RGB"}
        if model_input.shape[0] not in modes:
            raise NotImplementedError(
                f"load_images: the model takes {model_input.shape[0]} channels; image files give 1 or 3. "
                f"Store the images as float32 arrays in an .npz instead."
            )
        self.files = list(files)
        self.mode = modes[model_input.shape[0]]
        self.transform = model_input.transform() if resize else model_input.as_it_is

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Tensor:
        from PIL import Image

        path, label = self.files[index]
        with Image.open(path) as image:
            pixels = self.transform(image.convert(self.mode))
        return pixels if label is None else (pixels, label)

    def batches_of_one_size(self, batch_size: int) -> list[list[int]]:
        """Places of images that can be one batch as they are: neighbours of equal size."""
        batches: list[list[int]] = []
        sizes = [image_size(path) for path, _ in self.files]
        for index, size in enumerate(sizes):
            if not index or size != sizes[index - 1] or len(batches[-1]) == batch_size:
                batches.append([])
            batches[-1].append(index)
        return batches


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file; only its head is read."""
    from PIL import Image

    with Image.open(path) as image:
        return image.height, image.width


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory; iterating gives batches, as often as wanted, each made ready only when its turn comes.

    Args:
        images: (N, H, W, C) uint8, which are scaled to 0..1, resized and normalised; or (N, C, H, W) float32, which are
            ready for the model and left as they are.
        labels: (N,) int64, or None; then the batches are images alone.
        model_input: what the images are made ready for.
        batch_size: images in a batch; the last may be smaller.
        resize: make uint8 images the model's size.
    """

    images: Tensor
    labels: Tensor | None
    model_input: ModelInput
    batch_size: int
    resize: bool = True

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
        if self.resize and x.shape[2:] != self.model_input.shape[1:]:
            x = F.interpolate(x, size=self.model_input.shape[1:], mode="bilinear", align_corners=False)
        return normalise(x, self.model_input.mean, self.model_input.std)


def load_images(
    path: str | Path,
    model_input: ModelInput | None = None,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    classes: Sequence[str] | None = None,
    workers: int = 0,
    labels: bool = True,
    resize: bool = True,
) -> DataLoader[Any] | ArrayImages:
    """Images from disk, in batches that :func:`sw_transplant.check.verify` and any evaluation loop take.

    Args:
        path: a folder with one folder of image files per class, such as ImageNet's ``val`` (a class's number is its
            place among the sorted names); a folder of image files alone, which have no labels; or an ``.npz`` with
            ``images``, (N, H, W, C) uint8 or (N, C, H, W) float32, optionally ``labels`` (N,), and optionally ``mean``
            and ``std`` (C,) that replace the model's. uint8 images are scaled to 0..1, resized (bilinear) to the
            model's size and normalised; float32 images are taken as they are.
        model_input: what the model takes: ``ModelInput.of(model)``; None: 3 x 224 x 224 with ImageNet's mean and std.
        batch_size: images in a batch.
        limit: use this many images at most, spread evenly over all of them (and so over the classes of a folder).
        classes: the names of the class folders in the order of the model's outputs, where that is not the order of the
            names, or where the folders are only some of the classes.
        workers: processes that read image files; 0 reads in this one.
        labels: False takes the images alone: all below the folder, however it is arranged, or those of the ``.npz``.
        resize: False leaves the images their size, scaled to 0..1 and normalised; a batch then ends where the size
            changes.

    Returns:
        An iterable, to be used as often as wanted, of (images (B, C, H, W) float32, labels (B,) int64), or of images
        alone where there are no labels.

    Raises:
        ValueError: nothing at ``path``, no images in it, images beside class folders, an array of a wrong shape or
            dtype, a label that the model has no class for, or a number of class folders that is not the model's number
            of classes.
    """
    path, model_input = Path(path), model_input or ModelInput()
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"load_images: {name} is {value}; it must be at least 1.")
    if classes is not None and not labels:
        raise ValueError("load_images: classes number the labels, which labels=False leaves out; leave one of them out")
    if path.is_dir():
        files = _spread(_files(path, model_input, classes, labels), limit)
        data = FolderImages(files, model_input, resize=resize)
        if not resize:
            return DataLoader(data, batch_sampler=data.batches_of_one_size(batch_size), num_workers=workers)
        return DataLoader(data, batch_size=batch_size, num_workers=workers)
    if not path.is_file():
        raise ValueError(f"load_images: there is no file or folder {path}; give a folder of images or an .npz.")
    if path.suffix != ".npz":
        raise ValueError(f"load_images: {path} is neither a folder nor an .npz; give a folder of images or an .npz.")
    if classes is not None:
        raise ValueError(f"load_images: classes name folders, and {path} is a file; leave them out.")
    loaded = _load_npz(path, model_input, batch_size, limit, labels)
    return loaded if resize else replace(loaded, resize=False)


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders in a folder, in the order that numbers them."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _spread(items: list[Any], limit: int | None) -> list[Any]:
    count = len(items) if limit is None else min(limit, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())


def _images_below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())


def _files(folder: Path, model_input: ModelInput, classes: Sequence[str] | None, labels: bool) -> list[File]:
    if not labels:
        found = _images_below(folder)
        if not found:
            raise ValueError(f"load_images: no images below {folder}; expected files such as .jpg or .png.")
        return [(file, None) for file in found]
    names, loose = class_folders(folder), _images_in(folder)
    of_classes = [(name, file) for name in names for file in _images_below(folder / name)]
    if loose and of_classes:
        raise ValueError(
            f"load_images: {folder} has {len(loose)} images beside its class folders ({loose[0].name}), which have no "
            f"class; move them, or take all images without labels (labels=False)."
        )
    if loose and classes is not None:
        raise ValueError(
            f"load_images: classes name folders, and {folder} has none with images; leave classes out for images "
            f"without labels."
        )
    if loose:
        return [(file, None) for file in loose]
    if not of_classes:
        raise ValueError(
            f"load_images: no images in {folder} or in the class folders of {folder} ({len(names)} of them); expected "
            f"files such as .jpg or .png, in one folder per class where there are labels."
        )
    order = names if classes is None else list(classes)
    if unknown := sorted(set(names) - set(order)):
        raise ValueError(f"load_images: the folders {unknown} of {folder} are not in classes; name every folder there.")
    if model_input.num_classes not in (None, len(order)):
        raise ValueError(
            f"load_images: {folder} has {len(order)} classes and the model has {model_input.num_classes}, so they "
            f"cannot be numbered; give the names of the model's classes in order as classes=[...], or leave the labels "
            f"out with labels=False."
        )
    return [(file, order.index(name)) for name, file in of_classes]


def _load_npz(
    path: Path, model_input: ModelInput, batch_size: int, limit: int | None, with_labels: bool
) -> ArrayImages:
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
    labels = arrays.get("labels") if with_labels else None
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
