"""The networks as timm sees them: registry, preprocessing, features, head, checkpointing, parameter groups."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from timm.layers.drop import DropPath
from timm.models import group_parameters
from torch import nn

import sw_transplant.models

Build = Callable[..., nn.Module]

ENTRY_POINTS = {
    "slak": ["slak_base", "slak_large", "slak_small", "slak_tiny"],
    "replknet": ["replknet_31b", "replknet_31l", "replknet_xl"],
    "unireplknet": [f"unireplknet_{size}" for size in ("a", "b", "f", "l", "n", "p", "s", "t", "xl")],
}
ALL_NAMES = [name for names in ENTRY_POINTS.values() for name in names]


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_every_entry_point_is_listed(module: str) -> None:
    assert sorted(timm.list_models(module=module)) == sorted(ENTRY_POINTS[module])
    assert set(ENTRY_POINTS[module]) <= set(timm.list_models())


def test_public_names() -> None:
    networks = ["RepLKNet", "SLaK", "ShiftWise", "ShiftWiseSLaK", "UniRepLKNet"]
    assert sw_transplant.models.__all__ == [*networks, "load_checkpoint"]


def test_import_without_timm_says_what_to_install() -> None:
    program = "import sys; sys.modules['timm'] = None; import sw_transplant.models"
    root = Path(sw_transplant.models.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode != 0
    assert 'ImportError: sw_transplant.models needs timm: pip install "sw-transplant[timm]"' in done.stderr


@pytest.mark.parametrize("name", ALL_NAMES)
def test_default_cfg_describes_the_network(name: str, full_size: Callable[[str], nn.Module]) -> None:
    model = full_size(name)
    cfg = model.default_cfg
    first = model.get_submodule(cfg["first_conv"])
    assert isinstance(first, nn.Conv2d)
    assert first.in_channels == cfg["input_size"][0] == 3
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert cfg["num_classes"] == model.num_classes == 1000
    assert cfg["interpolation"] == "bicubic"
    assert cfg["input_size"][1] == 32 * cfg["pool_size"][0]
    assert cfg["crop_pct"] == (1.0 if cfg["input_size"][1] == 384 else 0.875)
    assert cfg["mean"] == ((0.5, 0.5, 0.5) if name == "replknet_xl" else (0.485, 0.456, 0.406))
    assert cfg["std"] == ((0.5, 0.5, 0.5) if name == "replknet_xl" else (0.229, 0.224, 0.225))
    assert not cfg.get("url")
    assert not cfg.get("hf_hub_id")


def test_classes_channels_and_parts(small: Build, images: torch.Tensor) -> None:
    grey = small(num_classes=7, in_chans=1)
    assert grey(images[:, :1]).shape == (2, 7)

    model = small()
    features = model.forward_features(images)
    assert features.shape[1] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    torch.testing.assert_close(model.forward_head(features), model(images), rtol=0, atol=0)
    assert isinstance(model.get_classifier(), nn.Linear)


def test_reset_classifier(small: Build, images: torch.Tensor) -> None:
    model = small().double()
    pre_logits = model.forward_head(model.forward_features(images.double()), pre_logits=True)
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model(images.double()).shape == (2, 3)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(model(images.double()), pre_logits, rtol=0, atol=0)
    model.reset_classifier(0, "")
    assert model(images.double()).dim() == 4
    model.reset_classifier(4, "max")
    assert model(images.double()).shape == (2, 4)


def test_reset_classifier_refuses_what_it_cannot_do(small: Build) -> None:
    model = small()
    with pytest.raises(ValueError, match="reset_classifier: global_pool 'catavgmax' is not one of"):
        model.reset_classifier(3, "catavgmax")
    with pytest.raises(ValueError, match="num_classes=3 with global_pool=''"):
        model.reset_classifier(3, "")
    assert model.num_classes == 5


def test_features_of_all_stages(small: Build) -> None:
    features = small(features_only=True)
    assert features.feature_info.channels() == [info["num_chs"] for info in features.model.feature_info]
    assert features.feature_info.reduction() == [4, 8, 16, 32]
    x = torch.randn(1, 3, 128, 64)
    maps = features(x)
    assert [tuple(m.shape[1:]) for m in maps] == [
        (channels, 128 // reduction, 64 // reduction)
        for channels, reduction in zip(features.feature_info.channels(), features.feature_info.reduction(), strict=True)
    ]
    torch.testing.assert_close(maps[-1], small().forward_features(x), rtol=0, atol=0)


@pytest.mark.parametrize("out_indices", [(0, 2), (-3, -2), (3,), 2], ids=str)
def test_features_of_some_stages(small: Build, images: torch.Tensor, out_indices: int | tuple[int, ...]) -> None:
    expected = small(features_only=True)(images)
    features = small(features_only=True, out_indices=out_indices)
    chosen = expected[-out_indices:] if isinstance(out_indices, int) else [expected[i] for i in out_indices]
    maps = features(images)
    assert features.feature_info.channels() == [m.shape[1] for m in chosen]
    torch.testing.assert_close(maps, chosen, rtol=0, atol=0)


def test_features_drop_what_they_do_not_need(small: Build, images: torch.Tensor) -> None:
    pruned = small(features_only=True, out_indices=(0, 1))
    names = {name.removeprefix("model.") for name, _ in pruned.named_parameters()}
    full = {name for name, _ in small().named_parameters()}
    assert names < full
    assert not any(name.startswith(("head", "norm", "stages.2", "stages.3", "transitions.1")) for name in names)
    sum(m.sum() for m in pruned(images)).backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_forward_intermediates(small: Build, images: torch.Tensor) -> None:
    model = small()
    final, maps = model.forward_intermediates(images)
    assert len(maps) == 4
    torch.testing.assert_close(final, model.forward_features(images), rtol=0, atol=0)
    early, maps = model.forward_intermediates(images, indices=[0, 1], stop_early=True)
    assert len(maps) == 2
    torch.testing.assert_close(early, maps[-1], rtol=0, atol=0)
    with pytest.raises(NotImplementedError, match="norm=True is not supported"):
        model.forward_intermediates(images, norm=True)
    with pytest.raises(NotImplementedError, match="output_fmt 'NLC' is not supported"):
        model.forward_intermediates(images, output_fmt="NLC")


def test_drop_path_acts_in_training_only(small: Build, images: torch.Tensor) -> None:
    # SLaK and UniRepLKNet start with a layer scale of 1e-6, which would hide a dropped path.
    model = small(drop_path_rate=0.6)
    for name, parameter in model.named_parameters():
        if name.endswith(".gamma") and parameter.dim() == 1:
            nn.init.ones_(parameter)
    torch.testing.assert_close(model(images), model(images), rtol=0, atol=0)
    model.train()
    outputs = [model(images) for _ in range(4)]
    assert any(not torch.allclose(outputs[0], other) for other in outputs[1:])
    outputs[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_dropped_path_leaves_the_residual(small: Build) -> None:
    model = small(drop_path_rate=0.6).train()
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 1.0
    for stage in (1, 2, 3):  # the very first block has rate 0
        for block in model.blocks(stage):
            x = torch.randn(2, model.feature_info[stage]["num_chs"], 8, 6)
            torch.testing.assert_close(block(x), x, rtol=0, atol=0)


def test_training_without_drop_path_is_deterministic(small: Build, images: torch.Tensor) -> None:
    model = small().train()
    torch.testing.assert_close(model(images), model(images), rtol=0, atol=0)


def _gradients(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(1)
    model.zero_grad()
    logits = model(images)
    logits.square().sum().backward()
    return logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def test_gradient_checkpointing_recomputes_and_changes_nothing(small: Build, images: torch.Tensor) -> None:
    calls = []
    plain, checkpointed = small(drop_path_rate=0.5).train(), small(drop_path_rate=0.5).train()
    checkpointed.set_grad_checkpointing()
    checkpointed.blocks(2)[0].register_forward_pre_hook(lambda *_: calls.append(1))
    expected, actual = _gradients(plain, images), _gradients(checkpointed, images)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    assert len(calls) == 2
    checkpointed.set_grad_checkpointing(False)
    _gradients(checkpointed, images)
    assert len(calls) == 3


@pytest.mark.parametrize("coarse", [False, True])
def test_parameter_groups_follow_the_depth(small: Build, coarse: bool) -> None:
    model = small()
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    assert groups[model.default_cfg["first_conv"] + ".weight"] == 0
    first_of_stage = {
        stage: next(group for name, group in groups.items() if name.startswith(f"stages.{stage}."))
        for stage in range(4)
    }
    assert 0 < first_of_stage[0] < first_of_stage[1] < first_of_stage[2] < first_of_stage[3] < groups["head.weight"]
    last_block = max(group for name, group in groups.items() if name.startswith("stages."))
    assert groups["norm.weight"] == (groups["head.weight"] if coarse else last_block)
    assert last_block + 1 == groups["head.weight"]


def test_pretrained_needs_a_file_and_takes_one(small: Build, images: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        small(pretrained=True)
    source = small(num_classes=1000)
    nn.init.normal_(source.head.bias)
    file = tmp_path / "weights.pth"
    torch.save({"model": source.state_dict()}, file)
    loaded = small(num_classes=1000, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    torch.testing.assert_close(loaded(images), source(images), rtol=0, atol=0)
