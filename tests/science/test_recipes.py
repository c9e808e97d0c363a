"""Recipes in timm's words: that its training script takes every one of them, and trains on the recipe's schedule."""

import argparse
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from timm.data import Mixup, resolve_data_config
from timm.data.auto_augment import rand_augment_transform
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

import sw_transplant.models  # noqa: F401
from sw_transplant.cli import main
from sw_transplant.science.recipes import RECIPES

# The options of timm's train.py that a recipe may set, with what they convert a string to; None for a switch. The
# script is not part of the package that pip installs.
OPTIONS: dict[str, type | None] = {
    "model": str, "img_size": int, "batch_size": int, "grad_accum_steps": int, "drop_path": float,
    "opt": str, "lr": float, "weight_decay": float, "layer_decay": float,
    "sched": str, "sched_on_updates": None, "epochs": int, "warmup_epochs": int, "warmup_prefix": None,
    "warmup_lr": float, "min_lr": float, "cooldown_epochs": int,
    "mixup": float, "cutmix": float, "smoothing": float, "aa": str, "color_jitter": float, "reprob": float,
    "remode": str, "train_interpolation": str, "model_ema": None, "model_ema_decay": float,
}  # fmt: skip
UPDATES = 10
"""Steps of an epoch in the test."""


def as_the_script_parses(text: str) -> argparse.Namespace:
    """YAML as defaults of a parser, which converts what is a string there and takes no key that is no option."""
    given = yaml.safe_load(text)
    unknown = set(given) - set(OPTIONS)
    assert not unknown, f"train.py has no options {unknown}"
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    for name, kind in OPTIONS.items():
        option = f"--{name.replace('_', '-')}"
        if kind is None:
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=kind)
    for name, value in given.items():
        kind = OPTIONS[name]
        assert isinstance(value, bool) if kind is None else not isinstance(value, bool), name
        assert isinstance(value, kind or bool) or (kind is float and isinstance(value, int)), (name, value)
    parser.set_defaults(momentum=0.9, **given)  # which recipes leave as it is
    return parser.parse_args(["IMAGENET"])


def printed(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["recipe", name]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_timm_trains_as_the_recipe_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, arguments = RECIPES[name], as_the_script_parses(printed(name, capsys))
    assert arguments.batch_size * arguments.grad_accum_steps * 8 == recipe.batch_size
    with torch.device("meta"):
        model = timm.create_model(arguments.model, drop_path_rate=arguments.drop_path, depths=(1, 1, 1, 1))
    assert getattr(model.stages[3][0].drop_path, "drop_prob", None) == pytest.approx(recipe.drop_path)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=arguments))
    assert type(optimizer).__name__ == "AdamW"
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, recipe.weight_decay}

    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(arguments), updates_per_epoch=UPDATES)
    assert epochs == recipe.epochs
    lrs: list[float] = []
    for update in (1, recipe.warmup_epochs * UPDATES, recipe.epochs * UPDATES - 1, recipe.epochs * UPDATES):
        scheduler.step_update(update)
        lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs[:2] == pytest.approx([recipe.lr / (recipe.warmup_epochs * UPDATES), recipe.lr])
    assert recipe.min_lr < lrs[2] < 1.01 * recipe.min_lr
    assert lrs[3] == pytest.approx(recipe.min_lr)

    Mixup(arguments.mixup, arguments.cutmix, label_smoothing=arguments.smoothing, num_classes=10)
    rand_augment_transform(arguments.aa, {"translate_const": 100})
    data = resolve_data_config({"img_size": arguments.img_size}, model=model)
    assert data["input_size"] == (3, 224, 224)
    assert (arguments.model_ema, arguments.model_ema_decay) == (recipe.ema_decay is not None, recipe.ema_decay)


def test_the_printed_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("sw_tiny_300", capsys)
    commands = [shlex.split(line[1:]) for line in text.splitlines() if line.startswith("#   ")]
    own, timms = commands
    assert own[:4] == ["torchrun", "--nproc-per-node=8", "examples/train_imagenet.py", "sw_tiny_300"]
    assert timms[2:] == ["train.py", "IMAGENET", "--config", "sw_tiny_300.yaml"]
    assert (Path(__file__).resolve().parents[2] / own[2]).is_file()
    settings: dict[str, Any] = yaml.safe_load(text)
    assert (settings["epochs"], settings["warmup_epochs"], settings["drop_path"]) == (295, 5, 0.2)
    assert "300 epochs" in text


def test_numbers_that_timm_would_read_as_text_are_noticed() -> None:
    with pytest.raises(AssertionError, match="min_lr"):
        as_the_script_parses("min_lr: 1e-06")  # YAML 1.1 wants a point
    with pytest.raises(AssertionError, match="no options"):
        as_the_script_parses("prune_rate: 0.3")
