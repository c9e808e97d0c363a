"""The commands of docs/reproducing.md, each at toy size: drawn images, small networks, random weights."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image, ImageDraw
from timm.scheduler import CosineLRScheduler

import sw_transplant.models  # noqa: F401
from sw_transplant.cli import main
from tests.sampling import sample

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", PAGE)
COMMANDS = sorted({code for code in CODE if code.startswith(("sw-transplant ", "python ", "torchrun "))})
# What takes a GPU and minutes is run by the tests of the benchmarks.
BENCHMARKS = [command for command in COMMANDS if "benchmarks/" in command]
RUN = [command for command in COMMANDS if command not in BENCHMARKS]
TRAINS = [command for command in RUN if "train_imagenet" in command]
COSTS = [command for command in RUN if command.startswith("sw-transplant cost")]
# Of trainings, a recipe of filters, a step of the ladder, and one of each option; of costs likewise; all else.
WORDS = ("sw_tiny", "sw#", "--prune-rate", "dilated", "interleaved", "1.5", "slak_small")
QUICK = [command for command in RUN if command not in TRAINS + COSTS or any(word in command for word in WORDS)]
ROWS = [[cell.strip() for cell in line.split(" |")] for line in PAGE.splitlines() if line.startswith("| ")]
SHORT = ["--epochs", "2", "--size", "64", "--batch-size", "4", "--total-batch", "8", "--workers", "0"]
SHORT += ["--update-frequency", "1", "--device", "cpu"]


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
        model = timm.create_model(name, **SETTINGS)
        if name == "sw_tiny":
            model.stages[0][0].large_kernel.paths[0].weight.data[:4] = 0  # published weights are sparse
        torch.save({"model": model.state_dict()}, found[name])
    return found


SETTINGS = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "kernel_size": (13, 11, 9, 7, 3), "num_classes": 2}
SETTINGS |= {"width_factor": 1.0, "layer_scale_init_value": 1.0}
OTHERS: dict[str, dict[str, Any]] = {
    "replknet": {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "large_kernel_sizes": (9, 9, 9, 9)},
    "convnext": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
    "unireplknet": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "kernel_sizes": ((3,), (13,), (13,), (13,))},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm builds small networks of the same names; other settings are those of the page."""
    create = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, *a, **k: create(name, *a, **{**k, **OTHERS.get(name.split("_")[0], SETTINGS)}),
    )


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) > 30
    assert len(BENCHMARKS) == 3
    assert len(QUICK) > 15


def test_every_row_has_a_command_or_says_why_not() -> None:
    tables = [row for row in ROWS if len(row) == 5 and row[0] not in ("| what", "|---")]
    assert len(tables) > 40
    for what, _, command, here, _ in tables:
        codes = re.findall(r"`([^`]+)`", command)
        assert all(code in COMMANDS for code in codes), what
        assert here, what
        if not codes:
            assert re.search("other people's|drawings|as printed", here), what


@pytest.mark.parametrize("command", sample(RUN, QUICK))
def test_every_command_of_the_page_runs(
    command: str, imagenet: Path, weights: dict[str, Path], small: None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    network = "sw_tiny" if "sw_tiny" in command else "slak_tiny"
    places = {"FILE": str(weights[network]), "IMAGENET": str(imagenet)}
    words = shlex.split(command.replace("sw#", "sw\\#"))
    words = [re.sub("FILE|IMAGENET", lambda found: places[found[0]], word) for word in words]
    if words[0] == "sw-transplant":
        extra = {"erf": ["--size", "64", "--num-classes", "2"], "cost": ["--size", "64"], "ladder": ["--no-cost"]}
        assert main([*words[1:], *extra.get(words[1], [])]) == 0
        assert capsys.readouterr().out.strip()
        return
    if words[:2] == ["python", "-c"]:
        exec(words[2], {})
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


RUNS = {
    "slak_tiny_300": [],  # averaged weights and their pass over the images; single weights out of use
    "sw_tiny_300": ["--dynamics", "published"],  # filters, in parallel paths
}


def states_equal(one: Any, other: Any) -> bool:
    """Bit for bit, tensors and numbers in dicts and lists."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(states_equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(states_equal, one, other))
    return bool(one == other)


def assert_it_goes_on(run: Callable[..., None], folder: Path) -> None:
    """Three epochs at once, and one and two: the same weights, averages, moments, masks and rates."""
    run("--epochs", "3", "--output", str(folder / "whole"))
    run("--epochs", "3", "--output", str(folder / "parts"), "--stop-epoch", "1")
    half = torch.load(folder / "parts" / "checkpoint.pth", weights_only=True)
    assert half["epoch"] == 0
    run("--epochs", "3", "--output", str(folder / "parts"), "--resume", str(folder / "parts" / "checkpoint.pth"))
    whole, parts = (torch.load(folder / name / "checkpoint.pth", weights_only=True) for name in ("whole", "parts"))
    assert whole["epoch"] == 2
    assert states_equal(whole, parts)
    masks = [name for name in whole["model"] if name.endswith("mask")]
    assert any(not torch.equal(half["model"][name], whole["model"][name]) for name in masks)
    assert not states_equal(half["model"], whole["model"])


@pytest.mark.parametrize("recipe", RUNS)
def test_an_interrupted_run_goes_on_bit_by_bit(
    recipe: str, imagenet: Path, small: None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def run(*more: str) -> None:
        arguments = [recipe, "--data", str(imagenet), *SHORT, *RUNS[recipe], *more]
        monkeypatch.setattr(sys, "argv", ["train_imagenet.py", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "examples" / "train_imagenet.py"), run_name="__main__")
        assert not end.value.code

    assert_it_goes_on(run, tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.split(":")[0] for line in lines] == [f"epoch {number}" for number in (0, 1, 2, 0, 1, 2)]
    assert lines[:3] == lines[3:]


@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", RUNS)
def test_two_processes_train_and_go_on_bit_by_bit(recipe: str, imagenet: Path, tmp_path: Path) -> None:
    """As the page says, through torchrun; gloo on the CPU. Masks, rates and averages agree in both."""
    settings = json.dumps({**SETTINGS, "dims": (8, 8, 8, 8)})

    def run(*more: str) -> None:
        script = str(ROOT / "examples" / "train_imagenet.py")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
        command += [recipe, "--data", str(imagenet), *SHORT, "--model", settings, *RUNS[recipe], *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("top-1") <= 4  # one process speaks

    assert_it_goes_on(run, tmp_path)


@pytest.mark.parametrize("recipe", sample(["slak_tiny_300", "sw_tiny_120"], ["sw_tiny_120"]))
def test_the_schedule_warms_up_and_comes_to_the_smallest_rate(
    recipe: str, imagenet: Path, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rates = []
    step_update = CosineLRScheduler.step_update

    def recorded(self: CosineLRScheduler, *arguments: Any) -> None:
        step_update(self, *arguments)
        rates.append(self.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(CosineLRScheduler, "step_update", recorded)
    monkeypatch.setattr(sys, "argv", ["train_imagenet.py", recipe, "--data", str(imagenet), *SHORT, "--epochs", "4"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "examples" / "train_imagenet.py"), run_name="__main__")
    assert len(rates) == 4  # one step in each epoch
    assert rates == pytest.approx([2e-3, 4e-3, (4e-3 + 1e-6) / 2, 1e-6])
