"""Adapters beside converted layers: trained with them, saved without them, loaded into the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from sw_transplant import convert, restore
from tests.acceptance import relative_rms, shiftwise_layers
from tests.hf.models import MODELS

POINTWISE = ["pwconv1", "pwconv2"]


def model() -> Any:
    return MODELS["ConvNext"].model()


def adapted(one: Any, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(one, peft.LoraConfig(r=4, **{"target_modules": POINTWISE, **arguments}))


def train(one: nn.Module) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = (one(pixel_values=MODELS["ConvNext"].images()).logits - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits(one: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return one.eval()(pixel_values=MODELS["ConvNext"].images()).logits


def test_adapters_train_beside_converted_layers_and_load_into_the_original(tmp_path: Path) -> None:
    plain, converted = adapted(model()), adapted(convert(model()))
    before = [layer.weight.clone() for layer in shiftwise_layers(converted).values()]
    expected = train(plain)
    assert expected[-1] < expected[0]
    assert train(converted) == pytest.approx(expected, rel=1e-5)
    assert all(map(torch.equal, before, (layer.weight for layer in shiftwise_layers(converted).values())))
    converted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path)
    assert relative_rms(logits(loaded), logits(converted)) <= 1e-5
    assert relative_rms(logits(model()), logits(converted)) > 1e-2


def test_merged_adapters_are_part_of_a_folder_like_any_other(tmp_path: Path) -> None:
    converted = adapted(convert(model()))
    train(converted)
    expected = logits(converted)
    merged = converted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path)
    assert len(shiftwise_layers(loaded)) == MODELS["ConvNext"].layers
    assert relative_rms(logits(loaded), expected) <= 1e-5
    assert relative_rms(logits(restore(loaded)), expected) <= 1e-5


def test_adapters_of_transformers_own_are_saved_without_the_model(tmp_path: Path) -> None:
    converted = convert(model())
    torch.manual_seed(0)
    converted.add_adapter(peft.LoraConfig(r=4, target_modules=POINTWISE))
    train(converted)
    converted.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "model.safetensors").exists()
    loaded = model()
    loaded.load_adapter(str(tmp_path))
    assert relative_rms(logits(loaded), logits(converted)) <= 1e-5


def test_a_converted_layer_may_be_trained_whole(tmp_path: Path) -> None:
    converted = adapted(convert(model()), modules_to_save=["dwconv", "classifier"])
    before = logits(converted)
    train(converted)
    trained = [name for name, parameter in converted.named_parameters() if parameter.requires_grad and "bank" in name]
    assert len(trained) == MODELS["ConvNext"].layers
    after = logits(converted)
    assert relative_rms(after, before) > 1e-2
    converted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(convert(model()), tmp_path)
    assert torch.equal(logits(loaded), after)


def test_a_converted_layer_takes_no_adapter() -> None:
    with pytest.raises(ValueError, match=r"(?s)ShiftwiseConv2d.* is not supported"):
        adapted(convert(model()), target_modules=["dwconv"])


def test_adapters_train_in_the_trainer(tmp_path: Path) -> None:
    from tests.hf.training import trainer

    converted = adapted(convert(model()))
    running = trainer(converted, tmp_path, max_steps=2)
    running.train()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path / "checkpoint-2")
    assert relative_rms(logits(loaded), logits(converted)) <= 1e-5
    assert isinstance(loaded.base_model.model, transformers.PreTrainedModel)
