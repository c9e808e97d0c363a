"""The commands of docs/reproducing.md, each at toy size: drawn images, small networks, random weights."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image, ImageDraw

import sw_transplant.models  # noqa: F401
from sw_transplant.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", PAGE)
COMMANDS = sorted({code for code in CODE if code.startswith(("sw-transplant ", "python ", "torchrun "))})
# What takes a GPU and minutes is run by the tests of the benchmarks.
BENCHMARKS = [command for command in COMMANDS if "benchmarks/" in command]
SMALL = '{"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "kernel_size": [13, 11, 9, 7, 3]}'
SHORT = ["--epochs", "2", "--size", "64", "--batch-size", "4", "--total-batch", "8", "--workers", "0"]
SHORT += ["--update-frequency", "1", "--model", SMALL, "--device", "cpu"]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bars and discs, in `train` and `val`."""
    root = tmp_path_factory.mktemp("imagenet")
    for part, count in (("train", 4), ("val", 2)):
        for name in ("bars", "discs"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (40, 40), (40 * i, 40, 60))
                draw = ImageDraw.Draw(image)
                (draw.rectangle if name == "bars" else draw.ellipse)((8, 5 + i, 30, 20 + i), fill=(250, 200, 20 * i))
                image.save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights of the small networks, in files."""
    folder = tmp_path_factory.mktemp("weights")
    found = {}
    for name in ("slak_tiny", "sw_tiny"):
        torch.manual_seed(0)
        found[name] = folder / f"{name}.pth"
        torch.save({"model": timm.create_model(name, **SETTINGS).state_dict()}, found[name])
    return found


SETTINGS = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "kernel_size": (13, 11, 9, 7, 3), "num_classes": 2}
SETTINGS |= {"width_factor": 1.0, "layer_scale_init_value": 1.0}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm builds small networks of the same names."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, *a, **k: create(name, *a, **{**k, **SETTINGS}))


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) > 12
    assert len(BENCHMARKS) == 3


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in BENCHMARKS])
def test_every_command_of_the_page_runs(
    command: str, imagenet: Path, weights: dict[str, Path], small: None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    network = "sw_tiny" if "sw_tiny" in command else "slak_tiny"
    words = shlex.split(command.replace("sw#", "sw\\#"))
    words = [str(weights[network]) if word == "FILE" else word.replace("IMAGENET", str(imagenet)) for word in words]
    if words[0] == "sw-transplant":
        extra = {"erf": ["--size", "64", "--num-classes", "2"], "cost": ["--size", "64"], "ladder": ["--no-cost"]}
        assert main([*words[1:], *extra.get(words[1], [])]) == 0
        assert capsys.readouterr().out.strip()
        return
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    arguments = words[script + 1 :]
    if "train_imagenet" in words[script]:
        arguments += SHORT
    else:
        network_settings = {key: value for key, value in SETTINGS.items() if key != "layer_scale_init_value"}
        content = {"model": network_settings, "input": {"shape": [3, 64, 64]}}
        (tmp_path / "config.json").write_text(json.dumps(content))
        arguments += ["--config", str(tmp_path / "config.json")]
    monkeypatch.setattr(sys, "argv", [words[script], *arguments])
    monkeypatch.syspath_prepend(ROOT / "examples")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / words[script]), run_name="__main__")
    output = capsys.readouterr()
    assert not end.value.code, output.err
    if "train_imagenet" in words[script]:
        assert re.search(r"^epoch 1: loss \d\.\d+, top-1 ", output.out, re.MULTILINE)
        assert (tmp_path / "run" / "checkpoint.pth").is_file()


def test_a_checkpoint_of_the_script_goes_on(
    imagenet: Path, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--resume", str(tmp_path / "run" / "checkpoint.pth"), "--epochs", "3"]):
        arguments = ["slak_tiny_300", "--data", str(imagenet), *SHORT, *more]
        monkeypatch.setattr(sys, "argv", ["train_imagenet.py", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "examples" / "train_imagenet.py"), run_name="__main__")
        assert not end.value.code
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.split(":")[0] for line in lines] == ["epoch 0", "epoch 1", "epoch 2"]
    assert all("60.0% in use" in line for line in lines)
