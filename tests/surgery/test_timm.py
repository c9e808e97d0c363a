"""What timm does to models, done to a converted one: checkpoints, groups of parameters, heads, averages."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import CheckpointSaver, ModelEmaV3, reparameterize_model
from torch import nn

from sw_transplant import SWConfig, convert, restore
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.surgery.names import no_weight_decay, original_names
from tests.acceptance import randomise, relative_rms, shiftwise_layers
from tests.snapshots import assert_same_model


def original(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model("test_convnext2", num_classes=5, **arguments).eval())


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = (model(images()) - 1).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_steps_of_its_optimizers_are_those_of_the_original() -> None:
    for name in ("adamw", "sgd", "lamb", "lion"):
        losses = []
        for model in (original(), convert(original())):
            optimizer = create_optimizer_v2(model.train(), name, lr=1e-3, weight_decay=0.1, layer_decay=0.7)
            losses.append([step(model, optimizer) for _ in range(5)])
        assert losses[1] == pytest.approx(losses[0], rel=1e-5), name


def test_checkpoints_are_saved_and_resumed(tmp_path: Path) -> None:
    model = convert(original(), SWConfig(edges=2))
    optimizer = create_optimizer_v2(model.train(), "adamw", lr=1e-2)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    step(model, optimizer)
    saver.save_checkpoint(0, metric=1.0)
    expected = [step(model, optimizer) for _ in range(2)]
    resumed = convert(original(), SWConfig(edges=2)).train()
    again = create_optimizer_v2(resumed, "adamw", lr=1e-2)
    assert resume_checkpoint(resumed, str(tmp_path / "last.pth.tar"), again) == 1
    assert [step(resumed, again) for _ in range(2)] == expected
    with pytest.raises(RuntimeError, match="Missing key"):
        load_checkpoint(original(), str(tmp_path / "last.pth.tar"))


def test_the_originals_checkpoint_loads_into_a_converted_model(tmp_path: Path) -> None:
    trained = randomise(original(), seed=9)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "trained.pth")
    converted = convert(original())
    load_checkpoint(converted, str(tmp_path / "trained.pth"))
    assert_same_model(restore(converted), trained)


def test_layers_get_the_learning_rate_of_their_depth() -> None:
    plain = original()
    converted = convert(plain, SWConfig(edges=2))
    scales = []
    for model in (plain, converted):
        groups = param_groups_layer_decay(model, layer_decay=0.5)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        scales.append({names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]})
    assert len(set(scales[0].values())) > 3
    former = original_names(converted)
    assert {former.get(name, name) for name in scales[1]} >= scales[0].keys()
    for name, scale in scales[1].items():
        if not name.endswith("gain"):
            assert scale == scales[0][former.get(name, name)], name
        else:
            assert scale == scales[1][name.replace("gain", "bank")]


def test_gains_are_not_decayed() -> None:
    module = SWConv2d(6, 11, gain="channel", ghost=0.0)  # of two dimensions, which timm would decay
    model = nn.Sequential(nn.Conv2d(3, 6, 3), module, convert(nn.Conv2d(6, 6, 7, groups=6), SWConfig(edges=3)))
    gains = {"1.gain", "2.branches.0.gain"}
    assert no_weight_decay(model) == gains
    alone, decayed = param_groups_weight_decay(model, 0.1, no_weight_decay_list=no_weight_decay(model))
    assert (alone["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)
    held = {id(parameter) for parameter in alone["params"]}
    assert all(id(model.get_parameter(name)) in held for name in gains)
    model.no_weight_decay = lambda: {"0.weight"}
    assert no_weight_decay(model) == {"0.weight", *gains}
    assert no_weight_decay(module) == {"gain"}


def test_original_names() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 9, groups=4), nn.Sequential(nn.Conv2d(4, 4, 7, groups=4, bias=False)))
    assert original_names(convert(model, SWConfig(edges=2))) == {
        "0.branches.0.bank": "0.weight",
        "0.branches.0.bias": "0.bias",
        "1.0.branches.0.bank": "1.0.weight",
    }
    for plain in (timm.create_model("fastvit_t8"), original()):
        converted = convert(plain)
        former = original_names(converted)
        names = [former.get(name, name) for name, _ in converted.named_parameters()]
        assert sorted(names) == sorted(name for name, _ in plain.named_parameters())


def test_another_head() -> None:
    converted = convert(original())
    converted.reset_classifier(3)
    assert converted(images()).shape == (2, 3)
    assert shiftwise_layers(converted)


def test_features_only() -> None:
    plain = original(features_only=True)
    converted = convert(plain)
    with torch.no_grad():
        pairs = list(zip(converted(images()), plain(images()), strict=True))
    assert len(pairs) == 4
    assert all(relative_rms(got, expected) <= 1e-5 for got, expected in pairs)
    assert_same_model(restore(converted), plain)


def test_averages_and_reparameterization() -> None:
    converted = convert(original())
    ema = ModelEmaV3(converted, decay=0.5)
    optimizer = create_optimizer_v2(converted.train(), "sgd", lr=1e-2)
    step(converted, optimizer)
    ema.update(converted)
    names = dict(ema.module.named_parameters())
    name = next(iter(original_names(converted)))
    start = dict(convert(original()).named_parameters())[name]
    moved = dict(converted.named_parameters())[name]
    torch.testing.assert_close(names[name], (start + moved) / 2)
    model = copy.deepcopy(ema.module).eval()
    with torch.no_grad():
        assert relative_rms(reparameterize_model(model)(images()), model(images())) <= 1e-5
