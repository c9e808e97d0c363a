"""Which of timm's large-kernel models convert, and whether they stay the same function.

A sample runs with the other tests, every model with the exhaustive ones (20 minutes); or, to be able to interrupt it,

    python -m tests.test_survey --out survey.jsonl

writes one line per model, skips those that the file already has, and prints the totals.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import nn

from sw_transplant import NoLargeKernelError, convert, inspect_model
from sw_transplant.check.verify import bound_for
from tests.acceptance import largest_error, randomise, shiftwise_layers, with_form
from tests.sampling import sample

# Small members of families that are not in the table of acceptance.py, and other members of those that are.
SAMPLE = (
    "caformer_s18",
    "coat_tiny",
    "coatnext_nano_rw_224",
    "convmixer_1024_20_ks9_p14",
    "csatv2",
    "edgenext_x_small",
    "fastvit_mci0",
    "focalnet_tiny_lrf",
    "rdnet_tiny",
    "starnet_s4",
    "test_mambaout",
    "tf_mixnet_s",
)
UNLIKE_OTHERS = ("caformer_s18", "coatnext_nano_rw_224", "csatv2", "rdnet_tiny", "test_mambaout")
SIZES = (96, 128, 160, 192, 224, 256)
# The files of timm that are known to have such models.
KNOWN = {
    *(
        "coat",
        "convmixer",
        "convnext",
        "csatv2",
        "edgenext",
        "efficientnet",
        "efficientvit_msra",
        "fastvit",
        "focalnet",
    ),
    *("iformer", "inception_next", "mambaout", "maxxvit", "metaformer", "nasnet", "pnasnet", "rdnet", "starnet"),
}


def large_depthwise(model: nn.Module) -> list[str]:
    """Paths of the 2-D depthwise convolutions with a side of 7 or more."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 and max(module.kernel_size) >= 7
    ]


def timm_names() -> dict[str, list[str]]:
    """timm's own models by the file that has them, without those that other packages registered with it."""
    files = defaultdict(list)
    for name in timm.list_models():
        package, _, file = model_entrypoint(name).__module__.rpartition(".")
        if package == "timm.models":
            files[file].append(name)
    return files


def large_kernel_models(names: Iterable[str]) -> list[str]:
    """Those with a large depthwise convolution, found without allocating their weights."""
    found = []
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        if large_depthwise(model):
            found.append(name)
    return found


@torch.no_grad()
def survey(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Converts one model and compares it with itself before, in both forms.

    Returns:
        ``verdict`` ("same", "differs", "nothing converted"), and what it rests on; ready for JSON.
    """
    torch.manual_seed(0)
    model = randomise(timm.create_model(name).eval()).to(dtype)
    large = large_depthwise(model)
    record: dict[str, Any] = {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "large": len(large),
        "dtype": str(dtype).removeprefix("torch."),
    }
    inspection = inspect_model(model)
    left = {entry.path: entry.reason for entry in inspection.skipped if entry.path in large}
    record["left"] = dict(Counter(left.values()))
    images = _first_that_runs(name, model, dtype)
    calibrate(model, images)
    expected = model(images)
    record["size"] = list(images.shape[2:])
    try:
        converted = convert(model, inplace=True)
    except NoLargeKernelError:
        return {**record, "verdict": "nothing converted"}
    record["converted"] = len(shiftwise_layers(converted))
    record["unexplained"] = [path for path in large_depthwise(converted) if path not in left]
    record["errors"] = {
        form: largest_error(with_form(converted, form)(images), expected) for form in ("assembled", "shift")
    }
    same = max(record["errors"].values()) <= bound_for(dtype)
    if not same and dtype is torch.float32:
        del model, converted, expected
        gc.collect()
        return {**survey(name, torch.float64), "errors_float32": record["errors"]}
    return {**record, "verdict": "same" if same else "differs"}


@torch.no_grad()
def calibrate(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Brings the BatchNorm statistics near those of these images, in place.

    Without it, random networks that multiply their maps grow without bound, and amplify any rounding to an error.
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(3, *images.shape[1:], generator=generator).to(images)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.8  # the rest is what they were: random
    if norms:
        model.train()(torch.cat([images, noise]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def _first_that_runs(name: str, model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """An image of the smallest size that the model takes."""
    cfg = get_pretrained_cfg(name)
    default = cfg.input_size[-2:]
    smaller = [] if cfg.fixed_input_size else [(size, size) for size in SIZES if size < min(default)]
    for size in (*smaller, default):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(1, cfg.input_size[0], *size, generator=generator).to(dtype)
        try:
            model(images)
        except (RuntimeError, ValueError, AssertionError):
            if size == default:
                raise
        else:
            return images
    raise ValueError(f"{name}: no size to try, expected at least its default")


@pytest.mark.parametrize("name", sample(SAMPLE, UNLIKE_OTHERS))
def test_sample_stays_the_same(name):
    record = survey(name)
    assert record["verdict"] == "same", record
    assert record["converted"] > 0
    assert not record["left"], "every large depthwise convolution of the sample can be converted"
    assert not record["unexplained"], "a large depthwise convolution is neither converted nor reported"


@pytest.mark.early
@pytest.mark.exhaustive
@pytest.mark.parametrize("file", timm_names())
def test_every_large_kernel_model_stays_the_same(file):
    names = large_kernel_models(timm_names()[file])
    assert names or file not in KNOWN
    failures = {}
    for name in names:
        record = survey(name)
        if record["verdict"] != "same" or record["unexplained"]:
            failures[name] = record
        gc.collect()
    assert not failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one per model; is continued if it exists")
    parser.add_argument("names", nargs="*", help="models; all of timm's with a large depthwise convolution by default")
    arguments = parser.parse_args()
    known = {}
    if arguments.out.exists():
        known = {record["name"]: record for record in map(json.loads, arguments.out.read_text().splitlines())}
    for name in arguments.names or large_kernel_models(chain(*timm_names().values())):
        if name in known:
            continue
        try:
            record = survey(name)
        except Exception as error:  # one model that cannot be built or run must not end the survey
            record = {"name": name, "verdict": "error", "error": f"{type(error).__name__}: {error}"}
        known[name] = record
        with arguments.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
        gc.collect()
    print(f"{len(known)} models:", dict(Counter(record["verdict"] for record in known.values())))


if __name__ == "__main__":
    main()
