"""The images of ``--data``: made ready for the model, and every choice that is made on the way is said."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sw_transplant.check.images import ArrayImages, FolderImages, class_folders, image_size, load_images
from sw_transplant.check.model_input import ModelInput
from sw_transplant.check.verify import numbers_per_class
from sw_transplant.cli.load_model import InputError, LoadedModel
from sw_transplant.cli.messages import input_errors, note

LOOKED_AT = 20
"""Image files whose size is read for the note."""


def check_data(arguments: argparse.Namespace) -> None:
    """What can be said of the options without a model.

    Raises:
        InputError: options that do not go together, or a path that is not there.
    """
    given = {
        "--max-images": arguments.max_images is not None,
        "--classes": arguments.classes is not None,
        "--no-labels": arguments.no_labels,
        "--no-resize": arguments.no_resize,
    }
    if arguments.data is None:
        for option, is_given in given.items():
            if is_given:
                raise InputError(f"{option} needs --data: without it, two batches of noise are compared")
        return
    if not arguments.data.exists():
        raise InputError(f"--data {arguments.data}: no such file or folder")
    if arguments.classes is not None and arguments.no_labels:
        raise InputError("--classes numbers the labels, which --no-labels leaves out; leave one out")
    if arguments.no_resize and arguments.input_size is not None:
        raise InputError("--size asks for a size, --no-resize for the images' own; leave one out")


def images_for(arguments: argparse.Namespace, loaded: LoadedModel) -> Any:
    """The images of ``--data`` for :func:`verify`; None for noise.

    Raises:
        InputError: there are none, or their labels are not the model's.
    """
    if arguments.data is None:
        return None
    with input_errors():
        model_input = ModelInput.of(loaded.model, loaded.processor)
        if arguments.input_size is not None:
            shape = (model_input.shape[0], *arguments.input_size)
            model_input = replace(model_input, shape=shape, processor=None)  # a processor would make its own size
        classes = None if arguments.classes is None else _read_classes(arguments.classes)
        _question(arguments, model_input.num_classes, classes, "has {} classes")
        data = load_images(
            arguments.data,
            model_input,
            batch_size=arguments.batch_size,
            limit=arguments.max_images,
            classes=classes,
            labels=not arguments.no_labels,
            resize=not arguments.no_resize,
        )
        _say(arguments, data, model_input)
        _check_outputs(arguments, loaded, data, classes)
    return data


def _read_classes(file: Path) -> list[str]:
    """The names of the classes in the order of the model's outputs: one on each line, or a JSON list."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--classes {file}: cannot be read: {error}") from error
    names: Any = [line.strip() for line in text.splitlines() if line.strip()]
    if text.lstrip().startswith("["):
        try:
            names = json.loads(text)
        except ValueError as error:
            raise InputError(f"--classes {file}: begins as a JSON list, and is none: {error}") from error
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise InputError(
            f"--classes {file}: expected the names of the class folders in the order of the model's outputs, one on "
            f"each line or as a JSON list, each of them once"
        )
    return list(names)


def _question(
    arguments: argparse.Namespace, expected: int | None, classes: list[str] | None, what_the_model_has: str
) -> None:
    """Asks which classes the folders are where their number does not tell."""
    if arguments.no_labels or expected is None or not arguments.data.is_dir():
        return
    count = len(class_folders(arguments.data)) if classes is None else len(classes)
    if count in (0, expected):
        return
    what = (
        f"{arguments.data} has {count} class folders" if classes is None else f"{arguments.classes} has {count} names"
    )
    raise InputError(
        f"{what} and the model {what_the_model_has.format(expected)}: which of them are they? --classes FILE names the "
        f"model's classes in order, those without a folder, too; --no-labels compares the images without labels"
    )


def _check_outputs(arguments: argparse.Namespace, loaded: LoadedModel, data: Any, classes: list[str] | None) -> None:
    """Labels that the model's outputs do not answer would give "right 0 of 100"."""
    batch = next(iter(data))
    if isinstance(batch, Tensor):
        return
    outputs = numbers_per_class(loaded.model, batch[0][:1])
    if outputs is None:
        raise InputError(
            f"{arguments.data} has labels, and no output of the model is one number per class; --no-labels compares "
            f"the images without them"
        )
    _question(arguments, outputs, classes, "gives {} numbers for an image")


def _say(arguments: argparse.Namespace, data: Any, model_input: ModelInput) -> None:
    """Notes: how many images, with labels or not, their sizes, and what is done to them."""
    if isinstance(data, ArrayImages):
        count, labelled = len(data.images), data.labels is not None
        as_it_is = data.images.is_floating_point()
        height, width = data.images.shape[2:] if as_it_is else data.images.shape[1:3]
        sizes = {(int(height), int(width))}
    else:
        folder: FolderImages = data.dataset
        count, labelled, as_it_is = len(folder), folder.files[0][1] is not None, False
        sizes = {image_size(path) for path, _ in folder.files[:: max(1, len(folder) // LOOKED_AT)]}
    labels = "" if labelled else ", without labels"
    note(f"{count} images{labels}, {_sizes(sizes)}: {_treatment(arguments, data, model_input, as_it_is, sizes)}")


def _sizes(sizes: set[tuple[int, int]]) -> str:
    (height, width), (most_height, most_width) = (
        [pick(size[axis] for size in sizes) for axis in (0, 1)] for pick in (min, max)
    )
    smallest = f"{height}x{width}"
    return smallest if len(sizes) == 1 else f"{smallest} to {most_height}x{most_width}"


def _treatment(
    arguments: argparse.Namespace, data: Any, model_input: ModelInput, as_it_is: bool, sizes: set[tuple[int, int]]
) -> str:
    if as_it_is:
        return "taken as they are"
    by = data.model_input if isinstance(data, ArrayImages) else model_input
    normalised = f"normalised with mean {_numbers(by.mean)}, std {_numbers(by.std)}"
    if arguments.no_resize or (isinstance(data, ArrayImages) and sizes == {by.shape[1:]}):
        return f"not resized, {normalised}"
    size = "x".join(map(str, by.shape[1:]))
    whose = "--size" if arguments.input_size is not None else "the model's size"
    if isinstance(data, ArrayImages):
        return f"resized to {size} ({whose}), {normalised}"
    if by.processor is not None:
        return f"made {size} by the image processor of {by.processor}"
    how = "as timm does for this model" if by.timm_config is not None else "the shorter side to 8/7 of it first"
    return f"resized and cropped to {size} ({whose}; {how}), {normalised}"


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3g}" for value in values)
