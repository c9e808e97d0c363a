"""Where tiles go survives whatever is done to the buffers of a model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from sw_transplant import SWConfig, convert
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.layers.tables import Tables
from tests.acceptance import relative_rms, shiftwise_layers
from tests.small_models import Parallel, conv, conv_bn

DECAYS = (0.9, 0.9999)
AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "swa": lambda model: AveragedModel(model, use_buffers=True),
    **{
        f"{name} {decay}": lambda model, decay=decay, make=make: make(model, decay)
        for decay in DECAYS
        for name, make in {
            "ema": lambda model, decay: AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
            ),
            "ema of one": lambda model, decay: AveragedModel(model, avg_fn=get_ema_avg_fn(decay), use_buffers=True),
            "timm v2": ModelEmaV2,
            "timm v3": ModelEmaV3,
        }.items()
    },
}


def network() -> nn.Module:
    """A kernel with filled tiles, one with edges, and the paper's module; places of up to 50."""
    torch.manual_seed(0)
    strip = nn.Conv2d(4, 4, (51, 5), padding=(25, 2), groups=4)
    square = nn.Conv2d(4, 4, 13, padding=6, groups=4)
    model = nn.Sequential(
        convert(square, SWConfig(tile=5)), convert(strip, SWConfig(edges=3)), SWConv2d(4, 51, ghost=0.4)
    )
    for layer in shiftwise_layers(model).values():
        for name, parameter in layer.named_parameters():
            if name.endswith(("gain", "weight")):
                nn.init.uniform_(parameter, 0.5, 1)
    return model.eval()


@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_of_models_have_the_same_places(kind: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    averaged = AVERAGES[kind](model)
    for _ in range(5):
        getattr(averaged, "update_parameters", getattr(averaged, "update", None))(model)
    x = torch.randn(1, 4, 20, 20)
    with torch.no_grad():
        assert relative_rms(averaged.module(x), model(x)) <= 1e-5  # of one model five times
    for state in (averaged.module.state_dict(), model.state_dict()):
        for name, tensor in before.items():
            if not tensor.is_floating_point() and "num_batches" not in name:
                assert torch.equal(state[name], tensor), name
    fresh = network()
    fresh.load_state_dict(averaged.module.state_dict())
    with torch.no_grad():
        assert relative_rms(fresh(x), model(x)) <= 1e-5


def test_writing_into_the_state_dict_moves_nothing() -> None:
    model = network()
    x = torch.randn(1, 4, 20, 20)
    with torch.no_grad():
        expected = model(x)
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                tensor.zero_()
            assert name
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


def test_places_outlive_the_meta_device() -> None:
    model = network()
    x = torch.randn(1, 4, 20, 20)
    with torch.no_grad():
        expected = model(x)
    weights = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    ones = {name: tensor for name, tensor in model.named_buffers() if name.endswith("one_bank")}
    empty = copy.deepcopy(model).to("meta")
    assert all(table.is_meta for table in [empty[0].branches[0].index, empty[2].ghosts])
    empty.load_state_dict(weights, strict=False, assign=True)
    for name, tensor in ones.items():
        empty.get_submodule(name.rpartition(".")[0]).one_bank = tensor
    with torch.no_grad():
        assert torch.equal(empty(x), expected)


def test_tables_are_kept_once_per_device() -> None:
    given = torch.arange(5)
    tables = Tables({"a": given, "b": None})
    cpu, meta = (torch.device(name) for name in ("cpu", "meta"))
    assert tables.on(meta)["a"] is tables.on(meta)["a"]
    assert tables.on(meta)["a"].is_meta
    assert torch.equal(tables.on(cpu)["a"], given)
    assert tables.on(cpu)["b"] is None
    assert copy.deepcopy(tables) is tables
    moved = tables.only_on(cpu)
    assert list(moved._placed) == [cpu]
    assert torch.equal(pickle.loads(pickle.dumps(tables)).on(cpu)["a"], given)


def everything() -> nn.Module:
    """One kernel, strips with BatchNorms, a sum that adds its input, and the paper's module."""
    model = nn.Sequential(conv(), Parallel(conv_bn(), conv_bn(size=3), nn.BatchNorm2d(4)), PlusInput(), SWConv2d(4, 9))
    return model.eval()


class PlusInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


def empty(model: nn.Module) -> nn.Module:
    """From the meta device to memory that holds anything."""
    model = model.to("meta").to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    return model


@pytest.mark.parametrize("names", ["original", "converted"])
def test_weights_that_are_loaded_into_empty_memory(names: str) -> None:
    torch.manual_seed(0)
    model, x = everything(), torch.randn(2, 4, 12, 12)
    converted = convert(model)
    loaded = empty(copy.deepcopy(converted))
    loaded.load_state_dict((model if names == "original" else converted).state_dict())
    assert torch.equal(loaded(x), converted(x))


def test_empty_memory_is_initialised_as_convolutions_are() -> None:
    model = everything()
    converted = empty(convert(model))
    for layer in (model[0], converted[0]):
        torch.manual_seed(0)
        layer.reset_parameters()
    assert torch.equal(model[0].weight, converted[0].weight)
    assert torch.equal(model[0].bias, converted[0].bias)
    for module in converted.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.isfinite(converted(torch.randn(2, 4, 12, 12))).all()
    assert converted[1].branches[1].bank.std() > 0
