"""Does an official SLaK checkpoint keep its accuracy? Reads the weights, converts, and runs both on labelled images.

    python examples/verify_slak.py --checkpoint slak_tiny.pth --data imagenet/val --device cuda --batch-size 128

The checkpoints are those of the authors of SLaK. The data is a folder with one folder of images per class, such as
ImageNet's val, or an .npz (see sw_transplant.check.images.load_images). Networks of other sizes than the published
ones, and other preprocessing, are described in a JSON file for --config, of which either part may be left out:

    {"model": {"depths": [2, 2, 4, 2], "dims": [24, 48, 96, 160], "width_factor": 1.0, "num_classes": 10},
     "input": {"shape": [3, 96, 96], "mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]}}

The exit code is 0 if both compute the same function, 1 if not, and 2 if something given is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import sw_transplant as sw
import sw_transplant.models
from sw_transplant.check.images import load_images
from sw_transplant.check.model_input import ModelInput
from sw_transplant.check.verify import VerifyReport

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="slak_tiny", help="name in timm; default: slak_tiny")
    parser.add_argument("--checkpoint", type=Path, help="weights of that model: .pth or .safetensors")
    parser.add_argument("--data", type=Path, help="folder of class folders, or .npz")
    parser.add_argument("--config", type=Path, help="JSON file with keyword arguments of the model and its input")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--max-images", type=int, help="stop after so many, spread evenly over the classes")
    parser.add_argument("--form", choices=("auto", "shift", "assembled"), default="auto")
    parser.add_argument("--workers", type=int, default=0, help="processes that read image files")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    try:
        report = run(args)
    except (ValueError, NotImplementedError) as error:
        print(f"verify_slak: {error}", file=sys.stderr)
        return 2
    print(f"{report}\n\n{differences(report)}")
    return 0 if report.ok else 1


def run(args: argparse.Namespace) -> VerifyReport:
    """Reads everything, converts and compares.

    Raises:
        ValueError: something is missing, or does not fit.
        NotImplementedError: something is not supported.
    """
    missing = [name for name in ("checkpoint", "data") if getattr(args, name) is None]
    if missing:
        wanted = {
            "checkpoint": "--checkpoint FILE: an official SLaK checkpoint (nothing is downloaded)",
            "data": "--data PATH: ImageNet's val folder with its 1000 class folders, or an .npz of images and labels",
        }
        raise ValueError("\n  ".join(["please add:", *(wanted[name] for name in missing)]))
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: PyTorch sees no GPU here; try --device cpu")
    config = read_config(args.config)
    model = build(args.model, config.get("model", {}))
    sw_transplant.models.load_checkpoint(model, args.checkpoint)
    model_input = replace(ModelInput.of(model), **config.get("input", {}))
    data = load_images(args.data, model_input, batch_size=args.batch_size, limit=args.max_images, workers=args.workers)
    converted = sw.convert(model, sw.SWConfig(form=args.form))
    print(sw.summary(converted))
    return sw.verify(model, converted, data, device=args.device, dtype=DTYPES[args.dtype])


def read_config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path}: cannot be read as JSON ({error})") from error
    fits = isinstance(config, dict) and config.keys() <= {"model", "input"}
    if not fits or not set(config.get("input", ())) <= {"shape", "mean", "std"}:
        raise ValueError(
            f'--config {path}: expected "model": {{...}} and "input": {{"shape", "mean", "std"}}; see --help'
        )
    config["input"] = {key: tuple(value) for key, value in config.get("input", {}).items()}
    return config


def build(name: str, settings: dict[str, Any]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, **settings)
    except (RuntimeError, TypeError) as error:  # timm's words for an unknown model, Python's for an unknown setting
        raise ValueError(f"--model {name}: cannot be built with {settings} ({error})") from error
    return model.eval()


def differences(report: VerifyReport) -> str:
    """Accuracy and speed after, less those before; and the images whose class changed."""
    parts = []
    for title, before, after in (
        ("top-1", report.top1_original, report.top1_converted),
        ("top-5", report.top5_original, report.top5_converted),
    ):
        if before is not None and after is not None:
            points = 100 * (after.share - before.share)
            parts.append(f"{title} {after.count - before.count:+d} images ({points:+.2f} percentage points)")
    if report.same_top1 is not None:
        parts.append(f"another class for {report.images - report.same_top1.count} images")
    parts.append(f"{report.images_per_second_converted / report.images_per_second_original:.2f} times the speed")
    return f"difference: {', '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())
