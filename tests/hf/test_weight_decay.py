"""Which parameters a Trainer decays: those that it would decay in the original, and no gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from sw_transplant import SWConfig, convert
from sw_transplant.hf import last_checkpoint
from sw_transplant.hf.trainer import ShiftwiseTrainer
from sw_transplant.surgery.names import original_names
from tests.acceptance import shiftwise_layers
from tests.hf.training import EVERY, model, trainer


class Strips(nn.Module):
    """The name of its norm tells Trainer not to decay it; that of its other one says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, (13, 5), padding=(6, 2), groups=3)
        self.norm = nn.BatchNorm2d(3)
        self.small = nn.Sequential(nn.Conv2d(3, 3, 5, padding=2, groups=3, bias=False), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.small(x)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.strips = Strips()
        self.head = nn.Linear(3, 5)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.strips(pixel_values).relu().mean((2, 3)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def decayed(kind: Any, one: nn.Module, folder: Path) -> set[str]:
    return set(trainer(one, folder, kind=kind).get_decay_parameter_names(one))


def test_the_same_parameters_are_decayed_as_in_the_original(tmp_path: Path) -> None:
    plain = Classifier()
    converted = convert(plain)
    names = original_names(converted)
    expected = decayed(Trainer, plain, tmp_path)
    assert expected == {"strips.conv.weight", "strips.small.0.weight", "strips.small.1.weight", "head.weight"}
    assert {names.get(name, name) for name in decayed(ShiftwiseTrainer, converted, tmp_path)} == expected
    assert {names.get(name, name) for name in decayed(Trainer, converted, tmp_path)} != expected
    assert decayed(ShiftwiseTrainer, plain, tmp_path) == expected


def losses(kind: Any, one: nn.Module, folder: Path) -> list[float]:
    running = trainer(one, folder, kind=kind, save_strategy="no", weight_decay=5.0, max_steps=8)
    running.train()
    return [entry["loss"] for entry in running.state.log_history if "loss" in entry]


def test_strong_decay_is_the_same_as_in_the_original(tmp_path: Path) -> None:
    expected = losses(Trainer, Classifier(), tmp_path)
    assert losses(ShiftwiseTrainer, convert(Classifier()), tmp_path) == pytest.approx(expected, rel=1e-5)
    assert losses(Trainer, convert(Classifier()), tmp_path) != pytest.approx(expected, rel=1e-5)


def test_gains_are_left_alone(tmp_path: Path) -> None:
    converted = model(SWConfig(edges=2))
    gains = {name for name, _ in converted.named_parameters() if name.endswith("gain")}
    assert len(gains) == len(shiftwise_layers(converted))
    usual, ours = (decayed(kind, converted, tmp_path) for kind in (Trainer, ShiftwiseTrainer))
    assert (usual - ours) & dict(converted.named_parameters()).keys() == gains


def test_resuming_takes_the_last_whole_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint in it was written to its end"):
        trainer(model(), tmp_path, kind=ShiftwiseTrainer).train(resume_from_checkpoint=True)
    trainer(model(), tmp_path, kind=ShiftwiseTrainer, max_steps=2 * EVERY).train()
    (tmp_path / f"checkpoint-{2 * EVERY}" / "trainer_state.json").unlink()
    again = trainer(model(), tmp_path, kind=ShiftwiseTrainer, max_steps=2 * EVERY)
    again.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{2 * EVERY}")
