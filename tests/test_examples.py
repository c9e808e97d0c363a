"""The examples, each run as a user runs it: a process of its own that finds only the installed package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import nn

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


@pytest.mark.parametrize("sabotage", ["convert", "load", "merge"])
def test_demo_fails_when_a_model_differs(tmp_path: Path, sabotage: str) -> None:
    """A copy of the demo in which one function of the package hands out a slightly wrong model."""
    script = tmp_path / "sabotaged.py"
    script.write_text(
        f"""
import sys; sys.path.insert(0, {str(EXAMPLES)!r})
import torch, sw_transplant as sw, demo
honest = sw.{sabotage}
def wrong(*args, **kwargs):
    model = honest(*args, **kwargs)
    with torch.no_grad():
        model.head.bias[3] += 0.01
    return model
sw.{sabotage} = wrong
sys.exit(demo.main())
"""
    )
    process = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 1, process.stderr
    assert "\nFAILED: converted" in process.stdout


def test_trained_weights_say_what_they_are() -> None:
    weights = EXAMPLES / "digits_slak.safetensors"
    assert weights.stat().st_size < 1e6
    with safe_open(weights, framework="pt") as file:
        facts = {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}
    assert facts["config"]["kernel_size"] == [51, 49, 47, 13, 5]
    held_out = facts["held_out"]
    assert held_out["right"] > 0.97 * held_out["of"]
    assert held_out["right_without_strips"] < held_out["right"] - 0.05 * held_out["of"]


def test_train_writes_a_file_that_holds_the_weights(tmp_path: Path) -> None:
    output = run("train_digits_slak.py", "--epochs", 1, "--output", tmp_path / "weights.safetensors", cwd=tmp_path)
    right = int(re.search(r"held-out digits: (\d+) of 450 right", output).group(1))
    assert right > 0.5 * 450  # chance is a tenth
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["held_out"])["right"] == right
        assert file.get_tensor("stages.0.0.large_kernel.LoRA1.conv.weight").shape == (16, 1, 51, 5)


def test_verify_slak_asks_for_what_is_missing(tmp_path: Path) -> None:
    error = run("verify_slak.py", cwd=tmp_path, returns=2)
    assert "--checkpoint FILE" in error
    assert "--data PATH" in error
    assert "Traceback" not in error


def test_verify_slak_on_trained_weights(tmp_path: Path, shared: Path) -> None:
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
    output = run("verify_slak.py", *arguments, "--batch-size", 100, cwd=tmp_path)
    assert output.count("834 of 1000 (83.40%)") == 2
    assert "difference: top-1 +0 images (+0.00 percentage points)" in output
    assert "another class for 0 images" in output

    few = ("--max-images", 20, "--dtype", "float64", "--form", "shift")
    output = run("verify_slak.py", *arguments, *few, cwd=tmp_path)
    assert "the same function on 20 images, float64 on cpu" in output
    assert output.count("auto: ") == 0
    (tmp_path / "config.json").write_text(json.dumps({**config, "input": {"crop": 3}}))
    assert "config.json: expected" in run("verify_slak.py", *arguments, cwd=tmp_path, returns=2)
    del config["model"]["dims"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "does not fit SLaK" in run("verify_slak.py", *arguments, cwd=tmp_path, returns=2)


def losses(output: str) -> list[list[str]]:
    rows = [re.fullmatch(r" (\d+) +(\d+\.\d{6}) +(\d+\.\d{6})", line) for line in output.splitlines()]
    return [list(row.groups()) for row in rows if row]


def test_huggingface_classifier_learns_like_the_original(tmp_path: Path) -> None:
    output = run("convert_huggingface.py", "--steps", 6, cwd=tmp_path)
    steps = losses(output)
    assert [step for step, *_ in steps] == list("123456")
    assert all(abs(float(a) - float(b)) < 1e-3 for _, a, b in steps)
    assert float(steps[-1][2]) < 0.9 * float(steps[0][2])
    assert len(re.findall(r"dwconv\.weight +\d\.\d{4}e-\d\d +\d\.\d{4}e-\d\d", output)) == 5
    assert output.endswith("saved and loaded: the same, bit for bit\nOK\n")


def test_huggingface_frozen_backbone_of_a_local_segmentation_model(tmp_path: Path, upernet: nn.Module) -> None:
    upernet.save_pretrained(tmp_path / "upernet")
    output = run("convert_huggingface.py", "upernet", "--steps", 2, "--freeze-backbone", cwd=tmp_path)
    assert len(re.findall(r"backbone\S+dwconv\.weight +none +none", output)) == 4
    (_, first, _), (_, second, _) = losses(output)
    assert first != second
    assert output.endswith("OK\n")


def test_huggingface_refuses_what_is_no_model(tmp_path: Path) -> None:
    assert "has no config.json" in run("convert_huggingface.py", tmp_path, cwd=tmp_path, returns=2)


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


def test_the_papers_module_recovers_by_fine_tuning(tmp_path: Path) -> None:
    output = run("finetune_shiftwise.py", "--epochs", 1, cwd=tmp_path)
    right = [int(count) for count in re.findall(r"^  \D+?(?:epoch 1)?\s+(\d+)(?:$|   \()", output, re.MULTILINE)]
    original, converted, *_ = right
    assert original > 0.97 * 450
    assert converted > 0.8 * 450
    assert "3x51 + 51x3 + 3x3" in output
    assert int(re.findall(r"plain convolutions (\d+)", output)[0]) > 0.9 * 450
