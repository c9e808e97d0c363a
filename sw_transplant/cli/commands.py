"""What the commands of the command line do: from parsed arguments to what is printed."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import torch

from sw_transplant.check.certificate import CERTIFICATE_NAME
from sw_transplant.check.verify import verify
from sw_transplant.cli.certificates import certify
from sw_transplant.cli.data import check_data, images_for
from sw_transplant.cli.load_model import InputError, LoadedModel, load_model
from sw_transplant.cli.messages import input_errors, note
from sw_transplant.cli.results import Result
from sw_transplant.config import SWConfig
from sw_transplant.cuda import storage
from sw_transplant.find.match import NoLargeKernelError
from sw_transplant.find.search import inspect_model
from sw_transplant.find.summary import summary
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.surgery.convert import convert
from sw_transplant.surgery.hosts import is_host_folder
from sw_transplant.surgery.io import CONFIG_NAME, WEIGHTS_NAME, load, save
from sw_transplant.tables import render_table


def run_inspect(arguments: argparse.Namespace) -> Result:
    """The dry run. Raises InputError, as all commands."""
    model = load_for(arguments).model
    with input_errors():
        inspection = inspect_model(model, config_of(arguments), select=arguments.select)
    return Result(str(inspection), {"model": arguments.model, **inspection.to_dict()})


def run_cache(arguments: argparse.Namespace) -> Result:
    """Lists the compiled kernels on disk, or removes them."""
    place = storage.folder()
    if place is None:
        how = f"{storage.VARIABLE} is empty" if storage.VARIABLE in os.environ else "platformdirs is not installed"
        return Result(f"No compiled kernels are kept: {how}.", {"folder": None, "kernels": []})
    if arguments.clear:
        removed = storage.clear()
        return Result(f"Removed {removed} files from {place}.", {"folder": str(place), "removed": removed})
    entries = storage.entries()
    rows = [
        [entry.kernel if entry.whole else "(damaged)", entry.architecture, f"{entry.size / 1024:.0f} KiB"]
        for entry in entries
    ]
    rows.append([f"{len(entries)} kernels", "", f"{sum(entry.size for entry in entries) / 1024:.0f} KiB"])
    kernels = [
        {"file": e.path.name, "kernel": e.kernel, "architecture": e.architecture, "bytes": e.size, "whole": e.whole}
        for e in entries
    ]
    table = render_table(f"Compiled kernels in {place}", ["kernel", "architecture", "size"], rows)
    return Result(table, {"folder": str(place), "kernels": kernels})


def run_convert(arguments: argparse.Namespace) -> Result:
    """Converts, saves, and lists the layers."""
    if arguments.output is not None:
        _check_output(arguments.output)
    elif arguments.certificate:
        raise InputError("--certificate needs --output FOLDER: it is about what is saved there")
    loaded = load_for(arguments)
    if arguments.output is None:
        note("without --output nothing is saved")
    elif loaded.random is not None:
        note(loaded.random)
    converted = convert_for(loaded.model, arguments, inplace=not arguments.certificate)
    if arguments.output is not None:
        with input_errors():
            save(converted, arguments.output)
            (arguments.output / CERTIFICATE_NAME).unlink(missing_ok=True)  # of an earlier conversion
    # Whatever could still be converted has been left out by --select, and is to be reported so.
    config, nothing = config_of(arguments), lambda path, module: False
    text = summary(converted, config, select=nothing)
    if arguments.output is not None:
        description = CONFIG_NAME if (arguments.output / CONFIG_NAME).is_file() else "config.json"
        text += f"\nSaved in {arguments.output}: {WEIGHTS_NAME} and {description}."
    code = 0
    if arguments.certificate:
        report = certify(loaded.model, converted, arguments.output, config, arguments.seed)
        text += f"\n{CERTIFICATE_NAME} written.\n{report}"
        code = 0 if report.ok else 1
    left = inspect_model(converted, config, select=nothing)
    values = {
        "model": arguments.model,
        "output": None if arguments.output is None else str(arguments.output),
        "config": config.to_dict(),
        "layers": [_layer(path, m) for path, m in converted.named_modules() if isinstance(m, ShiftwiseConv2d)],
        "skipped": left.to_dict()["skipped"],
        "certificate": str(arguments.output / CERTIFICATE_NAME) if arguments.certificate else None,
    }
    return Result(text, values, code)


def run_verify(arguments: argparse.Namespace) -> Result:
    """Compares a model with its conversion, made now or saved before."""
    check_comparison(arguments)
    loaded = load_for(arguments)
    original = loaded.model
    if loaded.random is not None:
        note(f"{loaded.random}; many networks start with blocks that hardly count, and hide errors in them")
    if arguments.converted is None:
        converted = convert_for(original, arguments, inplace=False)
    else:
        with input_errors():
            converted = load(original, arguments.converted)
    with input_errors():
        report = verify(
            original,
            converted,
            images_for(arguments, loaded),
            bounds=arguments.bound,
            batch_size=arguments.batch_size,
            device=arguments.device,
            dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
            input_size=arguments.input_size if arguments.data is None else None,
            seed=arguments.seed,
            certificate=arguments.certificate,
            config=config_of(arguments) if arguments.converted is None else None,
        )
    values = {
        "model": arguments.model,
        "converted": None if arguments.converted is None else str(arguments.converted),
        "data": None if arguments.data is None else str(arguments.data),
        **report.to_dict(),
    }
    return Result(str(report), values, 0 if report.ok else 1)


def load_for(arguments: argparse.Namespace) -> LoadedModel:
    """MODEL, with the weights that the options name."""
    return load_model(
        arguments.model, checkpoint=arguments.checkpoint, num_classes=arguments.num_classes, seed=arguments.seed
    )


def config_of(arguments: argparse.Namespace) -> SWConfig:
    """What the options ask for."""
    given = {name: getattr(arguments, name, None) for name in ("min_kernel", "tile", "form", "guarantee")}
    return SWConfig(**{name: value for name, value in given.items() if value is not None})


def convert_for(model: torch.nn.Module, arguments: argparse.Namespace, *, inplace: bool) -> torch.nn.Module:
    """The conversion that the options ask for."""
    try:
        with input_errors():
            return convert(model, config_of(arguments), select=arguments.select, inplace=inplace)
    except InputError as error:
        if not isinstance(error.__cause__, NoLargeKernelError):
            raise
        found = re.split("[:;]", str(error))[0]  # what follows is the table of what was left, or advice for Python
        raise InputError(
            f"{arguments.model}: {found}; lower --min-kernel, or see: sw-transplant inspect {arguments.model}"
        ) from error


def _layer(path: str, module: ShiftwiseConv2d) -> dict[str, Any]:
    return {
        "path": path,
        "form": module.form,
        "stride": list(module.stride),
        "channels": [module.in_channels, module.out_channels],
        "kernels": [list(branch.geometry.kernel_size) for branch in module.branches],  # type: ignore[arg-type, union-attr]
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
    }


# ---- checks that need no model ----


def _check_output(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: it is a file, expected a folder")
    if (folder / WEIGHTS_NAME).exists() and not (folder / CONFIG_NAME).exists() and not is_host_folder(folder):
        raise InputError(
            f"--output {folder}: its {WEIGHTS_NAME} is not a converted model's and would be lost; name another folder"
        )


def check_comparison(arguments: argparse.Namespace) -> None:
    """What can be said of the options of verify and report without a model."""
    if getattr(arguments, "converted", None) is not None:
        for option in ("min_kernel", "tile", "form", "guarantee", "select"):
            if getattr(arguments, option) is not None:
                name = option.replace("_", "-")
                raise InputError(f"--{name} does not go with --converted, which is converted already; leave one out")
    check_data(arguments)
    if arguments.device is not None:
        _check_device(arguments.device)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: expected cpu, cuda, or cuda:1 and so on") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InputError(f"--device {name}: PyTorch sees {count} CUDA devices here; cpu is always there")
    elif device != torch.device("cpu"):
        raise InputError(f"--device {name}: expected cpu, cuda, or cuda:1 and so on")
