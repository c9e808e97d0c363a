"""What came, what was expected, what to do: messages of what people do first."""

from __future__ import annotations

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
