"""What a model takes as input: size, normalisation, classes, and the transform that makes an image ready for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_SHARE = 224 / 256  # of the resized image, the habit for ImageNet


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

    def as_it_is(self, image: Image) -> Tensor:
        """A PIL image of any size, scaled to 0..1 and normalised: float32 (C, H, W) of its own size."""
        return normalise(_scaled(image), self.mean, self.std)


def _scaled(image: Image) -> Tensor:
    pixels = np.array(image, dtype=np.float32)  # (H, W) or (H, W, C)
    return (torch.from_numpy(pixels).reshape(image.height, image.width, -1).permute(2, 0, 1) / 255).contiguous()


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., C, H, W) minus the mean of its channel, over its standard deviation."""
    return (x - x.new_tensor(mean).view(-1, 1, 1)) / x.new_tensor(std).view(-1, 1, 1)


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


def _resize_crop_normalise(model_input: ModelInput, image: Image) -> Tensor:
    from PIL.Image import Resampling

    _, height, width = model_input.shape
    least = int(width / CROP_SHARE), int(height / CROP_SHARE)  # PIL's order: width, height
    scale = max(least[0] / image.width, least[1] / image.height)
    resized = image.resize(
        (max(least[0], int(image.width * scale)), max(least[1], int(image.height * scale))), Resampling.BILINEAR
    )
    left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
    cropped = resized.crop((left, top, left + width, top + height))
    return normalise(_scaled(cropped), model_input.mean, model_input.std)
