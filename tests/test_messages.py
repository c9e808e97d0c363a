"""What came, what was expected, what to do: messages of what people do first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from sw_transplant import SWConfig, convert, inspect_model, load, merge, save
from tests.small_models import conv

MESSAGES: dict[str, tuple[Callable[[nn.Module, Path], Any], str]] = {
    "a dictionary": (lambda model, _: convert(model, {"tile": 3}), r"config: got dict .*expected an SWConfig"),
    "a mode": (lambda model, _: convert(model, "shiftwise"), r"config: got str .*expected an SWConfig"),
    "a number to select": (lambda model, _: convert(model, select=3), r"select: got 3, expected glob patterns"),
    "nothing to merge": (lambda *_: merge(None), r"merge: got NoneType, expected a model from convert"),
    "a converted base": (
        lambda model, folder: load(convert(model), folder),
        r"is converted already, expected a model of",
    ),
}


DAMAGE = {
    "stride": ("1", r"layer '0': stride: got \('1',\), expected two integers of at least 1"),
    "in_channels": ("4", r"layer '0': in_channels: got '4', expected an integer of at least 1"),
    "tile": (2.5, r"layer '0': branch: tile: got 2.5, expected an integer of at least 1"),
    "weight": (3, r"layer '0': branch: weight: got 3, expected the name of a part, or null"),
    "dilation": ("x", r"layer .*'dilation': 'x'.*expected integers"),
    "kernel_size": (["a", 3], "not the description of a converted layer"),
}


@pytest.mark.parametrize("field", DAMAGE)
def test_a_description_that_says_something_else(field: str, tmp_path: Path) -> None:
    value, message = DAMAGE[field]

    def replaced(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: value if name == field else replaced(each) for name, each in part.items()}
        return [replaced(each) for each in part] if isinstance(part, list) else part

    model = nn.Sequential(conv(), nn.ReLU())
    save(convert(model), tmp_path)
    path = tmp_path / "sw_config.json"
    path.write_text(json.dumps(replaced(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        load(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("kernel_size", (3, 3)), ("dilation", 2), ("padding", 0), ("groups", 1), ("padding_mode", "reflect")],
)
def test_settings_that_a_layer_cannot_follow(name: str, value: Any) -> None:
    layer = convert(nn.Sequential(conv()))[0]
    with pytest.raises(AttributeError, match=f"{name}: cannot be set to .* set it before converting"):
        setattr(layer, name, value)
    setattr(layer, name, getattr(layer, name))


def test_a_kernel_of_another_size_is_the_only_complaint() -> None:
    with pytest.raises(RuntimeError) as caught:
        convert(nn.Sequential(conv())).load_state_dict(nn.Sequential(conv(size=9)).state_dict())
    assert "size mismatch for 0.weight" in str(caught.value)
    assert "Missing" not in str(caught.value)


@pytest.mark.parametrize("name", MESSAGES)
def test_message(name: str, tmp_path: Path) -> None:
    call, message = MESSAGES[name]
    model = nn.Sequential(conv(), nn.ReLU())
    save(convert(model), tmp_path)
    with pytest.raises(ValueError, match=message):
        call(model, tmp_path)


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    config = SWConfig(tile=np.int64(3), seed=np.uint8(7))
    assert config == SWConfig(tile=3, seed=7)
    assert type(config.tile) is int


def test_a_single_channel() -> None:
    (skipped,) = inspect_model(nn.Sequential(nn.Conv2d(1, 1, 7, padding=3))).skipped
    assert "a single input channel" in skipped.reason
