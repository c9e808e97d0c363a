"""SW against the published networks: golden, names and shapes, counts; and as timm sees it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sw_transplant
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.models import ShiftWise, load_checkpoint

# Millions of parameters and thousand millions of multiplications at 224 x 224 (the paper's "FLOPs").
PUBLISHED = {"sw_tiny": (31.8, 5.0), "sw_small": (57.3, 9.4)}
FullSize = Callable[[str], nn.Module]
SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20), "kernel_size": (13, 11, 9, 7, 3), "num_classes": 5}


def _large_kernels(model: nn.Module) -> list[SWConv2d]:
    return [module for module in model.modules() if isinstance(module, SWConv2d)]


def _small(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("sw_tiny", **{**SMALL, **kwargs}).eval()


@pytest.fixture
def golden(shared: Path) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The tiny network with the official weights, and the tensors of the golden."""
    config = json.loads((shared / "goldens" / "tiny_configs.json").read_text())["sw"]
    tensors = load_file(shared / "goldens" / "sw_tiny.safetensors")
    model = ShiftWise(**config).eval()
    weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    model.load_state_dict(weights, strict=True)
    return model, tensors


@pytest.mark.parametrize("form", ["shift", "assembled", "auto"])
def test_logits_equal_the_official_ones(form: str, golden: tuple) -> None:
    model, tensors = golden
    for module in _large_kernels(model):
        module.form = form
    with torch.no_grad():
        logits = model(tensors["input"])
    torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=1e-5)


def test_merged_logits_equal_the_official_ones(golden: tuple) -> None:
    model, tensors = golden
    merged = sw_transplant.merge(model)
    assert len(_large_kernels(model)) == 5
    assert not _large_kernels(merged)
    with torch.no_grad():
        logits = merged(tensors["input"])
    torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=1e-5)


def test_an_official_checkpoint_brings_back_its_orders(golden: tuple, tmp_path: Path) -> None:
    """Nothing of the orders is in the file: they must not depend on what the module held before."""
    model, tensors = golden
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "sw.safetensors")
    with torch.device("meta"):
        other = ShiftWise(
            depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), kernel_size=(51, 49, 47, 13, 3), num_classes=10
        ).eval()
    other.to_empty(device="cpu")
    for buffer in other.buffers():
        buffer.zero_()
    load_checkpoint(other, tmp_path / "sw.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(other(tensors["input"]), tensors["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(name: str, shared: Path, full_size: FullSize) -> None:
    official = json.loads((shared / "goldens" / "state_dict_keys.json").read_text())[name]
    state = full_size(name).state_dict()
    # In order too: optimiser states of official checkpoints go by the order of the parameters.
    assert [(key, list(value.shape)) for key, value in state.items()] == list(official.items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str, full_size: FullSize, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the paper counts: multiplications of the small convolutions, so in form shift; torch counts 2 for each."""
    parameters, multiplications = PUBLISHED[name]
    model, images = full_size(name), torch.zeros(1, 3, 224, 224, device="meta")
    for kernel in _large_kernels(model):
        monkeypatch.setattr(kernel, "form", "shift")
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.05)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiplications, abs=0.05)


@pytest.mark.parametrize(("name", "millions"), [("sw_base", 100.3), ("sw_large", 221.8)])
def test_the_larger_sizes(name: str, millions: float, full_size: FullSize) -> None:
    assert sum(parameter.numel() for parameter in full_size(name).parameters()) / 1e6 == pytest.approx(
        millions, abs=0.05
    )


def test_every_entry_point_is_listed_and_described(full_size: FullSize) -> None:
    names = ["sw_base", "sw_large", "sw_small", "sw_tiny"]
    assert sorted(timm.list_models(module="shiftwise")) == names
    first = ["sw_slak_base", "sw_slak_small", "sw_slak_tiny"]
    assert sorted(timm.list_models(module="shiftwise_slak")) == first
    for name in (*names, "sw_slak_tiny"):
        model = full_size(name)
        cfg = model.default_cfg
        assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
        assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
        assert (cfg["num_classes"], cfg["input_size"], cfg["crop_pct"]) == (1000, (3, 224, 224), 0.875)


def test_features_of_all_stages() -> None:
    features = _small(features_only=True)
    x = torch.randn(1, 3, 128, 64)
    maps = features(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 32, 16), (12, 16, 8), (16, 8, 4), (20, 4, 2)]
    torch.testing.assert_close(maps[-1], _small().forward_features(x), rtol=0, atol=0)
    torch.testing.assert_close(_small(features_only=True, out_indices=(1,))(x), maps[1:2], rtol=0, atol=0)


def test_classes_channels_and_training() -> None:
    model = _small(num_classes=7, in_chans=1, drop_path_rate=0.3).train()
    logits = model(torch.randn(2, 1, 64, 96))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.reset_classifier(3)
    assert model(torch.randn(2, 1, 64, 96)).shape == (2, 3)


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for enable in (False, True):
        model = _small().train()
        model.set_grad_checkpointing(enable)
        model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_settings_reach_the_large_kernels() -> None:
    model = _small(ghost_ratio=0.5, N_path=3, N_rep=2, form="shift", width_factor=2, kernel_size=(13, 11, 9, 7, 5))
    first, *_ = kernels = _large_kernels(model)
    assert (first.in_channels, len(first.active), len(first.paths), first.edges) == (16, 8, 3, 2)
    assert [(kernel.length, kernel.tile) for kernel in kernels] == [(13, 5), (11, 5), (9, 5), (9, 5), (7, 5)]
    assert all(kernel.form == "shift" for kernel in kernels)


def test_initialisation() -> None:
    model = _small(dims=(32, 64, 96, 128))
    for kernel in _large_kernels(model):
        for path in kernel.paths:
            assert path.weight.std().item() == pytest.approx(0.02, rel=0.1)
    torch.manual_seed(0)
    full = ShiftWise(**SMALL).head.weight
    torch.manual_seed(0)
    torch.testing.assert_close(ShiftWise(**SMALL, head_init_scale=0.5).head.weight, full * 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depths": (3, 3, 9)}, r"ShiftWise: depths=\(3, 3, 9\) has 3 entries, expected 4"),
        ({"kernel_size": (51, 49, 47, 13)}, "kernel_size=.* has 4 entries, expected 5"),
        ({"ghost_ratio": 1.0}, "expected a fraction from 0 to below 1"),
        ({"N_rep": 0}, "edges 0, expected an integer of at least 1"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        ShiftWise(**settings)


@pytest.mark.parametrize("name", ["sw_tiny", "slak_tiny", "sw_slak_tiny"])
def test_backbones_of_detectors_have_a_norm_for_every_stage(name: str) -> None:
    settings = {**SMALL, "features_only": True}
    torch.manual_seed(0)
    plain = timm.create_model(name, **settings).eval()
    backbone = timm.create_model(name, **settings, stage_norms=True).eval()
    norms = {f"norm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")}
    assert set(backbone.model.state_dict()) - set(plain.model.state_dict()) == norms
    assert "norm.weight" not in backbone.model.state_dict()  # nor a classifier: the published files have neither
    backbone.model.load_state_dict(plain.model.state_dict(), strict=False)
    for i in range(4):
        nn.init.constant_(getattr(backbone.model, f"norm{i}").weight, i + 1.0)
    x = torch.randn(1, 3, 64, 64)
    for i, (own, other) in enumerate(zip(backbone(x), plain(x), strict=True)):
        wanted = torch.nn.functional.layer_norm(other.permute(0, 2, 3, 1), other.shape[1:2], eps=1e-6) * (i + 1)
        torch.testing.assert_close(own, wanted.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)
    short = timm.create_model(name, **settings, stage_norms=True, out_indices=(0, 1))
    assert not hasattr(short.model, "norm2")
