"""The examples: the demo as a user runs it, a process of its own that finds only the installed package.

The others run in this process, most of them on few digits, because their imports alone take longer; the exhaustive
tests run them as a user does, too.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

import sw_transplant as sw
from tests.sampling import sample

Run = Callable[..., str]
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: object, cwd: Path, returns: int = 0) -> str:
    """What an example prints; it runs in another folder than its own, and without a network."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == returns, f"{process.stdout}\n{process.stderr}"
    return process.stdout if returns == 0 else process.stderr


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Like `run`, in this process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    def run_here(script: str, *arguments: object, returns: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        output = capsys.readouterr()
        assert code == returns, f"{output.out}\n{output.err}"
        return output.err if returns == 2 else output.out

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    yield run_here
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def few_digits(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the digits to train on, a fifth of those held out."""
    digits = importlib.import_module("digits")
    everything = digits.digits()
    few = digits.Digits(*(part[:128] for part in everything[:2]), *(part[:90] for part in everything[2:]))
    monkeypatch.setattr(digits, "digits", lambda *_: few)


def cells(output: str, start: str) -> list[str]:
    """The cells of the table row that starts with a text."""
    rows = [line.strip() for line in output.splitlines() if line.strip().startswith(start)]
    assert len(rows) == 1, f"{len(rows)} rows start with {start!r}:\n{output}"
    return re.split(r"\s{2,}", rows[0])


def test_demo_ends_with_the_same_answers_everywhere(tmp_path: Path) -> None:
    output = run("demo.py", cwd=tmp_path)
    _, right, *_ = cells(output, "original   ")
    assert int(right.split()[0]) > 0.97 * 450
    for step in (
        'converted, form "shift"  ',
        'converted, form "assembled"  ',
        "converted and merged",
        "converted, saved",
    ):
        _, still_right, changed, difference, _ = cells(output, step)
        assert (still_right, changed) == (right, "0")
        assert float(difference) < 1e-4
    assert int(cells(output, "control: ")[2]) > 0
    assert "\nOK: every converted network gives the answers of the original.\n" in output
    assert 'timm.create_model("convnext_atto", pretrained=True)' in output


@pytest.mark.parametrize("sabotage", sample(["convert", "load", "merge"], ["load"]))
def test_demo_fails_when_a_model_differs(
    here: Run, few_digits: None, monkeypatch: pytest.MonkeyPatch, sabotage: str
) -> None:
    """One function of the package hands out a slightly wrong model."""
    honest = getattr(sw, sabotage)

    @torch.no_grad()
    def wrong(*arguments, **settings) -> nn.Module:
        model = honest(*arguments, **settings)
        model.head.bias[3] += 0.01
        return model

    monkeypatch.setattr(sw, sabotage, wrong)
    *_, failed = re.findall(r"^FAILED: (.*)$", here("demo.py", returns=1), re.MULTILINE)
    first = {"convert": "form", "load": "saved and loaded", "merge": "and merged back"}[sabotage]
    assert re.match(f"converted,? {first}", failed)
    assert "control" not in failed


def test_trained_weights_say_what_they_are() -> None:
    weights = EXAMPLES / "digits_slak.safetensors"
    assert weights.stat().st_size < 1e6
    with safe_open(weights, framework="pt") as file:
        facts = {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}
    assert facts["config"]["kernel_size"] == [51, 49, 47, 13, 5]
    held_out = facts["held_out"]
    assert held_out["right"] > 0.97 * held_out["of"]
    assert held_out["right_without_strips"] < held_out["right"] - 0.05 * held_out["of"]


def check_training(output: str, file: Path, held_out: int, at_least: float) -> None:
    right = int(re.search(rf"held-out digits: (\d+) of {held_out} right", output).group(1))
    assert right > at_least * held_out
    with safe_open(file, framework="pt") as weights:
        assert json.loads(weights.metadata()["held_out"])["right"] == right
        assert weights.get_tensor("stages.0.0.large_kernel.LoRA1.conv.weight").shape == (16, 1, 51, 5)


def test_train_writes_a_file_that_holds_the_weights(here: Run, few_digits: None, tmp_path: Path) -> None:
    output = here("train_digits_slak.py", "--epochs", 2, "--output", tmp_path / "weights.safetensors")
    assert output.count("epoch") == 2
    check_training(output, tmp_path / "weights.safetensors", 90, 0)


@pytest.mark.exhaustive
def test_train_learns(tmp_path: Path) -> None:
    output = run("train_digits_slak.py", "--epochs", 1, "--output", tmp_path / "weights.safetensors", cwd=tmp_path)
    check_training(output, tmp_path / "weights.safetensors", 450, 0.5)  # chance is a tenth


@pytest.mark.exhaustive
@pytest.mark.parametrize("script", ["convert_huggingface.py", "verify_slak.py"])
def test_in_a_process_of_its_own(tmp_path: Path, script: str) -> None:
    """The demo and the scripts that train have tests like this one of their own."""
    assert f"usage: {script}" in run(script, "--help", cwd=tmp_path)


def test_verify_slak_asks_for_what_is_missing(here: Run) -> None:
    error = here("verify_slak.py", returns=2)
    assert "--checkpoint FILE" in error
    assert "--data PATH" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(("images", "right"), sample([(200, 168), (1000, 834)], []))
def test_verify_slak_on_trained_weights(here: Run, tmp_path: Path, shared: Path, images: int, right: int) -> None:
    config = {
        "model": {"depths": [2, 2, 4, 2], "dims": [24, 48, 96, 160], "width_factor": 1.0, "num_classes": 10},
        "input": {"shape": [3, 96, 96], "mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = {
        "config": tmp_path / "config.json",
        "checkpoint": shared / "data" / "slak_cifar10.safetensors",
        "data": shared / "data" / "cifar10_test_1000.npz",
    }
    arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
    output = here("verify_slak.py", *arguments, "--batch-size", 100, "--max-images", images)
    assert output.count(f"{right} of {images} ({right / images:.2%})") == 2
    assert "difference: top-1 +0 images (+0.00 percentage points)" in output
    assert "another class for 0 images" in output

    few = ("--max-images", 20, "--dtype", "float64", "--form", "shift")
    output = here("verify_slak.py", *arguments, *few)
    assert "the same function on 20 images, float64 on cpu" in output
    assert output.count("auto: ") == 0
    (tmp_path / "config.json").write_text(json.dumps({**config, "input": {"crop": 3}}))
    assert "config.json: expected" in here("verify_slak.py", *arguments, returns=2)
    del config["model"]["dims"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "does not fit SLaK" in here("verify_slak.py", *arguments, returns=2)


def losses(output: str) -> list[list[str]]:
    rows = [re.fullmatch(r" (\d+) +(\d+\.\d{6}) +(\d+\.\d{6})", line) for line in output.splitlines()]
    return [list(row.groups()) for row in rows if row]


def test_huggingface_classifier_learns_like_the_original(here: Run) -> None:
    output = here("convert_huggingface.py", "--steps", 6)
    steps = losses(output)
    assert [step for step, *_ in steps] == list("123456")
    assert all(abs(float(a) - float(b)) < 1e-3 for _, a, b in steps)
    assert float(steps[-1][2]) < 0.9 * float(steps[0][2])
    assert len(re.findall(r"dwconv\.weight +\d\.\d{4}e-\d\d +\d\.\d{4}e-\d\d", output)) == 5
    assert output.endswith("saved and loaded: the same, bit for bit\nOK\n")


def test_huggingface_frozen_backbone_of_a_local_segmentation_model(
    here: Run, tmp_path: Path, upernet: nn.Module
) -> None:
    upernet.save_pretrained(tmp_path / "upernet")
    output = here("convert_huggingface.py", "upernet", "--steps", 2, "--freeze-backbone")
    assert len(re.findall(r"backbone\S+dwconv\.weight +none +none", output)) == 4
    (_, first, _), (_, second, _) = losses(output)
    assert first != second
    assert output.endswith("OK\n")


def test_huggingface_refuses_what_is_no_model(here: Run, tmp_path: Path) -> None:
    assert "has no config.json" in here("convert_huggingface.py", tmp_path, returns=2)


@pytest.fixture
def upernet() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ConvNextConfig(
        image_size=64,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=3, pool_scales=[1, 2], use_auxiliary_head=False
    )
    return transformers.UperNetForSemanticSegmentation(config)


def check_fine_tuning(output: str, held_out: int, recovers_to: float) -> None:
    right = [int(count) for count in re.findall(r"^  \D+?(?:epoch 1)?\s+(\d+)(?:$|   \()", output, re.MULTILINE)]
    original, by_kernels, calibrated, refitted, *_ = right
    assert original > 0.97 * held_out
    assert by_kernels > 0.8 * held_out
    assert min(calibrated, refitted) > 0.95 * held_out
    assert re.search(r"3x51 \+ 51x3 \+\s", output)  # the table wraps it
    assert int(re.findall(r"plain convolutions (\d+)", output)[0]) > recovers_to * held_out


@pytest.mark.exhaustive
def test_the_papers_module_is_fine_tuned(here: Run, few_digits: None) -> None:
    check_fine_tuning(here("finetune_shiftwise.py", "--epochs", 1, "--swaps", 0), 90, 0.9)


@pytest.mark.exhaustive
def test_the_papers_module_recovers_by_fine_tuning(tmp_path: Path) -> None:
    check_fine_tuning(run("finetune_shiftwise.py", "--epochs", 1, cwd=tmp_path), 450, 0.9)


# ---- fine-tuning with the tools of Hugging Face ----

TABLE = ("original, before", "converted, before", "converted, fine-tuned", "saved and loaded", "served by pipeline")


def rows_of(output: str) -> list[int]:
    assert output.endswith("OK\n"), output
    return [int(cells(output, name)[1].split()[0]) for name in TABLE]


def test_a_folder_of_images_is_learned(here: Run, tmp_path: Path) -> None:
    """Two classes that a few steps tell apart, files of two kinds and of several sizes."""
    for name, colour in {"dark": 40, "light": 215}.items():
        for i in range(12):
            file = tmp_path / "images" / name / f"{i}.{'png' if i % 2 else 'jpg'}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (60 + i, 70 - i), (colour, colour + i, colour)).save(file)
    arguments = ("--data", "images", "--output", "tuned", "--epochs", 3, "--batch", 6)
    before, same, after, *again = rows_of(here("finetune_huggingface.py", *arguments))
    assert before == same
    assert [after, *again] == [6, 6, 6]
    output = here("finetune_huggingface.py", *arguments[:2], "--model", "tuned", "--epochs", 0.1)
    assert rows_of(output)[:2] == [6, 6]


@pytest.mark.parametrize("case", ["no classes", "no folder", "no model"])
def test_fine_tuning_refuses_what_it_cannot_read(here: Run, tmp_path: Path, case: str) -> None:
    arguments = {
        "no classes": ("--data", tmp_path),
        "no folder": ("--data", "absent"),
        "no model": ("--model", "absent"),
    }
    expected = {"no classes": "0 subfolders", "no folder": "0 subfolders", "no model": "has no config.json"}
    assert expected[case] in here("finetune_huggingface.py", *arguments[case], returns=2)


@pytest.mark.exhaustive
def test_digits_are_learned_and_served(tmp_path: Path) -> None:
    before, _, after, *_ = rows_of(run("finetune_huggingface.py", cwd=tmp_path))
    assert before < 0.3 * 454 < 0.9 * 454 < after


def test_shapes_are_segmented(here: Run) -> None:
    output = here("finetune_segmentation.py", "--steps", 12)
    assert output.endswith("OK\n")
    _, before, after, again = cells(output, "background")
    assert float(before) < 0.5 < float(after) == pytest.approx(float(again), abs=2e-3)


@pytest.mark.exhaustive
def test_shapes_are_found_by_a_cascade(tmp_path: Path) -> None:
    output = run("cascade_mask_rcnn.py", cwd=tmp_path)
    found = re.search(r"masks found: (\d+) of 16", output)
    assert found, output
    assert int(found[1]) > 12


@pytest.mark.exhaustive
def test_shapes_of_every_kind_are_segmented(tmp_path: Path) -> None:
    output = run("finetune_segmentation.py", cwd=tmp_path)
    assert all(float(cells(output, f"{kind} ")[2]) > 0.4 for kind in ("background", "disc", "square", "triangle"))
