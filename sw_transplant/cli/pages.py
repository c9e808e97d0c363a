"""The command report."""

from __future__ import annotations

import argparse
import importlib
import tempfile
from pathlib import Path

import torch

from sw_transplant.check.certificate import CERTIFICATE_NAME, Certificate
from sw_transplant.check.rounding import LayerRounding
from sw_transplant.check.verify import verify
from sw_transplant.cli.commands import check_comparison, config_of, convert_for, load_for
from sw_transplant.cli.data import images_for
from sw_transplant.cli.load_model import InputError
from sw_transplant.cli.messages import input_errors, note
from sw_transplant.cli.results import Result


def run_report(arguments: argparse.Namespace) -> Result:
    """Converts, compares, and writes the page. Without matplotlib nothing is begun."""
    check_comparison(arguments)
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
        certificate = Certificate.read(Path(folder) / CERTIFICATE_NAME)
        layers = [LayerRounding.from_dict(layer) for layer in certificate.values["layers"]]
        from sw_transplant.report.page import write_report

        write_report(arguments.out, arguments.model, loaded.model, converted, report, layers, certificate)
    values = {"model": arguments.model, "out": str(arguments.out), **report.to_dict()}
    return Result(f"{report}\nWritten: {arguments.out}", values, 0 if certificate.ok else 1)
