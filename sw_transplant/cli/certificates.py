"""The command check, and the certificate that convert writes."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from sw_transplant.check.certificate import CERTIFICATE_NAME
from sw_transplant.check.certify import IMAGES
from sw_transplant.check.recheck import check_folder
from sw_transplant.check.report import VerifyReport
from sw_transplant.check.verify import verify
from sw_transplant.cli.load_model import InputError, load_model
from sw_transplant.cli.messages import input_errors, note
from sw_transplant.cli.results import Result
from sw_transplant.config import SWConfig


def run_check(arguments: argparse.Namespace) -> Result:
    """Checks a certificate again, with the original model where it is named."""
    folder: Path = arguments.folder
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected what convert --output FOLDER --certificate wrote")
    original = None
    if arguments.model is not None:
        loaded = load_model(
            arguments.model, checkpoint=arguments.checkpoint, num_classes=arguments.num_classes, seed=arguments.seed
        )
        if loaded.random is not None:
            note(loaded.random)
        original = loaded.model
    with input_errors():
        report = check_folder(folder, original)
    return Result(str(report), report.to_dict(), 0 if report.ok else 1)


def certify(original: nn.Module, converted: nn.Module, folder: Path, config: SWConfig, seed: int) -> VerifyReport:
    """Compares a model with its conversion on noise, and writes the certificate into the folder."""
    with input_errors():
        return verify(
            original,
            converted,
            batch_size=IMAGES,
            seed=seed,
            certificate=folder / CERTIFICATE_NAME,
            config=config,
        )
