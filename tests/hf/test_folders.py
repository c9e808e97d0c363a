"""Folders of converted models in three processes: written in one, read in one with this package and in one without."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto import auto_factory

from sw_transplant import SWConfig, convert
from sw_transplant.check.verify import bound_for
from sw_transplant.layers.sw_conv2d import SWConv2d
from tests.acceptance import largest_error, shiftwise_layers, tensors_of
from tests.hf.models import MODELS, Model
from tests.sampling import EXHAUSTIVE

ROOT = Path(__file__).resolve().parents[2]
READER = Path(__file__).with_name("read_folders.py")
BOUND = bound_for(torch.float32)


def dense(model: nn.Module) -> nn.Module:
    return convert(model)


def edges(model: nn.Module) -> nn.Module:
    """With extra edges that have grown: no plain kernel of the original's size is that."""
    converted = convert(model, SWConfig(edges=2))
    generator = torch.Generator().manual_seed(3)
    for layer in shiftwise_layers(converted).values():
        for branch in layer.branches:
            branch.gain.data.uniform_(0.5, 1, generator=generator)
    return converted


def masks(model: nn.Module) -> nn.Module:
    """With a mask that leaves tiles out."""
    converted = convert(model)
    generator = torch.Generator().manual_seed(3)
    for layer in shiftwise_layers(converted).values():
        branch = layer.branches[0]
        branch.set_mask(torch.rand(branch.tile_count, generator=generator) < 0.7)
    return converted


def shared(model: nn.Module) -> nn.Module:
    """The paper's module."""
    converted = convert(model, SWConfig(mode="shiftwise"))
    assert any(isinstance(module, SWConv2d) for module in converted.modules())
    return converted


PARTS = {"ConvNext": "convnext.encoder.stages.1.layers.0.dwconv", "TimmWrapper": "timm_model", "UperNet": "backbone"}


def part(model: nn.Module, make: Callable[[nn.Module], nn.Module] = dense) -> nn.Module:
    """A part is converted, and nobody tells the whole: a single convolution, a model of timm, one of transformers."""
    whole = copy.deepcopy(model)
    path = PARTS[next(name for name in PARTS if type(model).__name__.startswith(name))]
    if not hasattr(model, path.partition(".")[0]):
        path = path.partition(".")[2]  # the base model alone
    parent, _, name = path.rpartition(".")
    setattr(whole.get_submodule(parent), name, make(whole.get_submodule(path)))
    return whole


def part_edges(model: nn.Module) -> nn.Module:
    return part(model, edges)


KINDS = {
    "dense": dense,
    "edges": edges,
    "masks": masks,
    "shared": shared,
    "part": part,
    "part, edges": part_edges,
}
IN_PARTS = ("part", "part, edges")
# What is written and read takes seconds for each.
NAMES = list(MODELS) if EXHAUSTIVE else ["ConvNext", "TimmWrapper"]
OF = {"dense": NAMES, "edges": NAMES, "part": PARTS, "part, edges": ["UperNet"]}
CASES = [(name, kind) for name in NAMES for kind in KINDS if name in OF.get(kind, ["ConvNext"])]
PIPELINES = [(name, "AutoModelForImageClassification") for name in ("ConvNext", "TimmWrapper")]
DENSE = [(name, kind) for name, kind in CASES if kind in ("dense", "part")]
NO_PLAIN_FORM = [case for case in CASES if case not in DENSE]


@dataclass(frozen=True)
class Readings:
    """By model, kind of conversion and class that reads: what the writer has, and what both readers found.

    ``original``: the same class, reading the folder of the plain model, without keys of the kind.
    """

    original: dict[tuple[str, str], dict[str, Any]]
    written: dict[tuple[str, str, str], dict[str, Any]]
    having: dict[tuple[str, str, str], dict[str, Any]]
    lacking: dict[tuple[str, str, str], dict[str, Any]]


def readers(name: str) -> tuple[str, ...]:
    return (type(MODELS[name].build()).__name__, *MODELS[name].readers)


@pytest.fixture(scope="module")
def readings(tmp_path_factory: pytest.TempPathFactory) -> Readings:
    folder = tmp_path_factory.mktemp("folders")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto_factory, "hf_api", lambda: SimpleNamespace(repo_exists=lambda _: True))
        original, written, jobs = {}, {}, {}
        for name in NAMES:
            originals, kinds = write(name, folder)
            original |= originals
            written |= kinds
            for kind in KINDS:
                if (name, kind) in CASES:
                    place = {"folder": str(folder / name / kind), "images": str(folder / f"{name}.pt")}
                    for reader in readers(name):
                        pipeline = (name, reader) in PIPELINES and kind in ("dense", "edges")
                        jobs[name, kind, reader] = {**place, "reader": reader, "pipeline": pipeline}
    torch.set_num_threads(threads)
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    having, lacking = (dict(zip(jobs, read(folder, mode), strict=True)) for mode in ("with", "without"))
    return Readings(original, written, having, lacking)


def write(name: str, folder: Path) -> tuple[dict[tuple[str, str], Any], dict[tuple[str, str, str], Any]]:
    """Writes the folders of a plain model and of its conversions; what every class that reads them shall have."""
    row = MODELS[name]
    model, images = row.model(), row.images()
    torch.save(images, folder / f"{name}.pt")
    model.save_pretrained(folder / name / "original")
    converted = {kind: make(model) for kind, make in KINDS.items() if (name, kind) in CASES}
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": row.size}, crop_pct=1)
    for kind, one in converted.items():
        one.save_pretrained(folder / name / kind)
        processor.save_pretrained(folder / name / kind)
    original, written = {}, {}
    for reader in readers(name):
        plain, report = getattr(transformers, reader).from_pretrained(
            folder / name / "original", output_loading_info=True
        )
        original[name, reader] = {
            "missing_keys": sorted(report["missing_keys"]),
            "outputs": run(plain, row),
            "state": plain.state_dict(),
        }
        for kind, one in converted.items():
            twin = KINDS[kind](plain)
            pairs = zip(shiftwise_layers(twin).values(), shiftwise_layers(one).values(), strict=True)
            for layer, same in pairs:
                layer.load_state_dict(same.state_dict())
            written[name, kind, reader] = {"outputs": run(twin, row), "state": twin.state_dict()}
    return original, written


def run(model: nn.Module, row: Model) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors_of(model(pixel_values=row.images()))


def read(folder: Path, mode: str) -> list[dict[str, Any]]:
    """In a process of its own; the one without the package could not import it if it tried."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT) if mode == "with" else "", "HF_HUB_OFFLINE": "1"}
    results = folder / f"{mode}.pt"
    command = [sys.executable, str(READER), mode, str(folder / "jobs.json"), str(results)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(results)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_with_the_package_the_model_comes_back_bit_for_bit(readings: Readings, name: str, kind: str) -> None:
    for reader in readers(name):
        got, expected = readings.having[name, kind, reader], readings.written[name, kind, reader]
        assert "error" not in got, got
        assert got["shiftwise"] == (1 if kind in IN_PARTS and name == "ConvNext" else MODELS[name].layers)
        assert got["missing_keys"] == readings.original[name, reader]["missing_keys"], reader
        assert got["mismatched_keys"] == []
        assert list(got["state"]) == list(expected["state"])
        for key, tensor in expected["state"].items():
            assert torch.equal(got["state"][key], tensor), f"{reader}: {key}"
        for one, other in zip(got["outputs"], expected["outputs"], strict=True):
            assert torch.equal(one, other), reader


@pytest.mark.parametrize(("name", "kind"), DENSE)
def test_without_the_package_a_dense_folder_is_the_plain_model(readings: Readings, name: str, kind: str) -> None:
    for reader in readers(name):
        got, expected = readings.lacking[name, kind, reader], readings.original[name, reader]
        assert "error" not in got, got
        assert got["shiftwise"] == 0
        assert got["missing_keys"] == expected["missing_keys"], reader
        assert list(got["state"]) == list(expected["state"])
        assert all(torch.equal(got["state"][key], tensor) for key, tensor in expected["state"].items())
        assert largest_error(got["outputs"], expected["outputs"]) <= BOUND
        converted = readings.having[name, kind, reader]
        assert largest_error(converted["outputs"], expected["outputs"]) <= BOUND


@pytest.mark.parametrize("name", NAMES)
def test_its_own_class_misses_nothing_and_leaves_nothing(readings: Readings, name: str) -> None:
    own = readers(name)[0]
    for kind in ("dense", "edges"):
        if (name, kind) not in CASES:
            continue
        got = readings.having[name, kind, own]
        assert (got["missing_keys"], got["unexpected_keys"]) == ([], [])
    got = readings.lacking[name, "dense", own]
    assert (got["missing_keys"], got["unexpected_keys"]) == ([], [])


@pytest.mark.parametrize(("name", "kind"), NO_PLAIN_FORM)
def test_without_the_package_what_has_no_plain_form_is_refused(readings: Readings, name: str, kind: str) -> None:
    for reader in readers(name):
        got = readings.lacking[name, kind, reader]
        assert "pip install sw-transplant, then import sw_transplant.hf" in got["error"], reader


def test_pipelines_of_the_folder_answer_alike(readings: Readings) -> None:
    for name, reader in PIPELINES:
        having, lacking = (found[name, "dense", reader]["scores"] for found in (readings.having, readings.lacking))
        assert len(having) == 5
        assert having == pytest.approx(lacking, rel=1e-5)
        assert readings.having[name, "edges", reader]["scores"] != pytest.approx(lacking, rel=1e-3)
