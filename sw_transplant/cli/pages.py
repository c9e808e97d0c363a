"""The command report."""

from __future__ import annotations

import argparse
import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sw_transplant.check.certificate import CERTIFICATE_NAME, Certificate
from sw_transplant.check.model_input import ModelInput
from sw_transplant.check.rounding import LayerRounding
from sw_transplant.check.verify import verify
from sw_transplant.cli.commands import check_comparison, config_of, convert_for, load_for
from sw_transplant.cli.data import images_for
from sw_transplant.cli.load_model import InputError, LoadedModel
from sw_transplant.cli.messages import input_errors, note
from sw_transplant.cli.results import Result
from sw_transplant.science.erf import effective_receptive_field

FIELD_IMAGES = 4
"""Images on which receptive fields are measured, unless --receptive-field says how many."""


def run_report(arguments: argparse.Namespace) -> Result:
    """Converts, compares, and writes the page. Without matplotlib nothing is begun."""
    check_comparison(arguments)
    if arguments.map is not None and arguments.receptive_field is None:
        raise InputError("--map names the module whose receptive field is shown; add --receptive-field")
    with input_errors():
        importlib.import_module("matplotlib.figure")
    if arguments.out.is_dir():
        raise InputError(f"--out {arguments.out}: it is a folder, expected the name of an HTML file")
    loaded = load_for(arguments)
    if loaded.random is not None:
        note(loaded.random)
    converted = convert_for(loaded.model, arguments, inplace=False)
    with input_errors(), tempfile.TemporaryDirectory() as folder:
        report = verify(
            loaded.model,
            converted,
            images_for(arguments, loaded),
            batch_size=arguments.batch_size,
            device=arguments.device,
            dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
            input_size=arguments.input_size if arguments.data is None else None,
            seed=arguments.seed,
            certificate=Path(folder) / CERTIFICATE_NAME,
            config=config_of(arguments),
        )
        fields = _fields(arguments, loaded, converted)
        certificate = Certificate.read(Path(folder) / CERTIFICATE_NAME)
        layers = [LayerRounding.from_dict(layer) for layer in certificate.values["layers"]]
        from sw_transplant.report.page import write_report

        write_report(arguments.out, arguments.model, loaded.model, converted, report, layers, certificate, fields)
    values = {"model": arguments.model, "out": str(arguments.out), **report.to_dict()}
    return Result(f"{report}\nWritten: {arguments.out}", values, 0 if certificate.ok else 1)


def _fields(arguments: argparse.Namespace, loaded: LoadedModel, converted: nn.Module) -> dict[str, Tensor] | None:
    """The receptive fields of both models, on images of --data or on noise."""
    if arguments.receptive_field is None:
        return None
    channels, *size = ModelInput.of(loaded.model, loaded.processor).shape
    side = max(arguments.input_size or size)
    data = images_for(arguments, loaded)
    if data is None:
        generator = torch.Generator().manual_seed(arguments.seed)
        images = [torch.randn(arguments.receptive_field, channels, side, side, generator=generator)]
    else:
        images = _first(data, arguments.receptive_field)
    return {
        name: effective_receptive_field(model, images, size=side, map=arguments.map)
        for name, model in (("original", loaded.model), ("converted", converted))
    }


def _first(data: Any, count: int) -> list[Tensor]:
    """The first images of the data, in batches."""
    batches: list[Tensor] = []
    for batch in data:
        images = batch if isinstance(batch, Tensor) else batch[0]
        batches.append(images[: count - sum(map(len, batches))])
        if sum(map(len, batches)) == count:
            break
    return batches
