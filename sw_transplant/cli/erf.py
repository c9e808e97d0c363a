"""sw-transplant erf: effective receptive fields of networks, as the papers' table and as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sw_transplant.check.images import SUFFIXES
from sw_transplant.check.model_input import ModelInput, normalise
from sw_transplant.cli.load_model import InputError, load_model, one_line
from sw_transplant.cli.results import Result
from sw_transplant.science.erf import (
    PUBLISHED_SIZE,
    SHARES,
    effective_receptive_field,
    high_contribution_square,
    log_contributions,
    relative_contributions,
)
from sw_transplant.surgery.convert import convert
from sw_transplant.tables import render_table

if TYPE_CHECKING:
    from PIL.Image import Image

PUBLISHED_IMAGES = 50


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="see above; several are compared")
    parser.add_argument(
        "--checkpoint", action="append", metavar="PATH", help="weights, once for each MODEL; default: random ones"
    )
    parser.add_argument("--num-classes", type=int, metavar="N", help="outputs of the classifiers; for timm names")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="PATH", help="folder of images, or .npz with images"
    )
    parser.add_argument("--size", type=int, default=PUBLISHED_SIZE, help="height and width (%(default)s, as published)")
    parser.add_argument(
        "--max-images", type=int, default=PUBLISHED_IMAGES, metavar="N", help="of --data, evenly spread (%(default)s)"
    )
    parser.add_argument("--convert", action="store_true", help="each network converted, too")
    parser.add_argument("--out", type=Path, metavar="PNG", help="a picture of every network; default: none")
    parser.add_argument("--map", metavar="PATH", help="the module whose output is looked at; default: the last stage")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random weights (%(default)s)")


def run_erf(arguments: argparse.Namespace) -> Result:
    """Measures each network, prints the table, and draws."""
    checkpoints = arguments.checkpoint or [None] * len(arguments.models)
    if len(checkpoints) != len(arguments.models):
        raise InputError(
            f"{len(checkpoints)} --checkpoint for {len(arguments.models)} models; give one for each, or none"
        )
    if arguments.size < 3 or arguments.max_images < 1:
        raise InputError("--size and --max-images: expected at least 3 pixels and 1 image")
    if not arguments.data.exists():
        raise InputError(f"--data {arguments.data}: no such file or folder")
    matrices: dict[str, Tensor] = {}
    for name, checkpoint in zip(arguments.models, checkpoints, strict=True):
        model = load_model(name, checkpoint=checkpoint, num_classes=arguments.num_classes, seed=arguments.seed).model
        networks: dict[str, nn.Module] = {name: model}
        try:
            if arguments.convert:
                networks[f"{name}, converted"] = convert(model)
            for label, network in networks.items():
                images = _images(arguments, ModelInput.of(model))
                matrices[label] = effective_receptive_field(network, images, size=arguments.size, map=arguments.map)
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"{name}: {one_line(error)}") from error
    squares = {label: [high_contribution_square(matrix, t) for t in SHARES] for label, matrix in matrices.items()}
    rows = [[label, *(f"{100 * square.ratio:.1f}%" for square in each)] for label, each in squares.items()]
    title = f"Area of the centred square that holds a share t of the contributions; {arguments.size} x {arguments.size}"
    table = render_table(title, ["network", *(f"t = {100 * t:g}%" for t in SHARES)], rows)
    if arguments.out is not None:
        draw(matrices, arguments.out)
        table += f"\nPictures in {arguments.out}: contributions above, their logarithm below."
    values = {
        label: [
            {"share": t, "side": square.side, "ratio": square.ratio} for t, square in zip(SHARES, each, strict=True)
        ]
        for label, each in squares.items()
    }
    return Result(table, {"size": arguments.size, "networks": values})


def draw(matrices: dict[str, Tensor], path: Path) -> None:
    """Pictures side by side: above as Figure 3 of SLaK, below what the table measures.

    Raises:
        InputError: Pillow is not installed, or the file cannot be written.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise InputError('--out needs Pillow: pip install "sw-transplant[hf]"') from error
    side, edge, title = 256, 8, 16
    sheet = Image.new("RGB", (len(matrices) * (side + edge) + edge, 2 * (side + edge) + edge + title), "white")
    for column, (label, matrix) in enumerate(matrices.items()):
        left = edge + column * (side + edge)
        ImageDraw.Draw(sheet).text((left, 4), label, fill="black")
        for row, values in enumerate((relative_contributions(matrix), log_contributions(matrix))):
            picture = Image.fromarray(_coloured(values.numpy())).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(picture, (left, title + edge + row * (side + edge)))
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--out {path}: {one_line(error)}; expected a file that can be written, ending in .png"
        ) from error


def _coloured(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """White for nothing, over green, to dark for most."""
    steps = np.linspace(0, 1, 4)
    colours = ((255, 247, 188), (120, 198, 121), (35, 132, 67), (0, 40, 30))
    return np.stack([np.interp(values, steps, channel) for channel in zip(*colours, strict=True)], -1).astype(np.uint8)


def _images(arguments: argparse.Namespace, model_input: ModelInput) -> Iterator[Tensor]:
    """Normalised images, one at a time; files are resized without cropping."""
    from PIL import Image

    size = (arguments.size, arguments.size)
    if arguments.data.is_dir():
        files = sorted(file for file in arguments.data.rglob("*") if file.suffix.lower() in SUFFIXES)
        chosen = [files[i * len(files) // arguments.max_images] for i in range(arguments.max_images)]
        for file in chosen if len(files) > arguments.max_images else files:
            with Image.open(file) as image:
                yield _normalised(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), model_input)
        return
    with np.load(arguments.data, allow_pickle=False) as archive:
        pixels = archive["images"] if "images" in archive.files else np.zeros(0)
        given: dict[str, Any] = {
            key: tuple(map(float, archive[key])) for key in ("mean", "std") if key in archive.files
        }
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise ValueError(f"{arguments.data}: expected an array 'images' (N, H, W, 3) uint8")
    count = min(arguments.max_images, len(pixels))
    for i in range(count):
        image = Image.fromarray(pixels[i * len(pixels) // count]).resize(size, Image.Resampling.BICUBIC)
        yield _normalised(image, replace(model_input, **given) if given else model_input)


def _normalised(image: Image, model_input: ModelInput) -> Tensor:
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    return normalise(x, model_input.mean, model_input.std)
