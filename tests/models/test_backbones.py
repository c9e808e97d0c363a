"""Backbones of detectors and segmenters: their published files, and those of the classifiers that they begin with."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch

import sw_transplant.models  # noqa: F401
from sw_transplant.models import load_checkpoint

SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "num_classes": 3, "width_factor": 1.0}
KERNELS = {"slak_tiny": (9, 9, 7, 7, 5), "sw_tiny": (9, 9, 7, 7, 3)}


def _official_detector(name: str, shared: Path) -> dict[str, torch.Tensor]:
    """The weights of a detector as its program names them: published names, norms of the stages, other parts."""
    official = json.loads((shared / "goldens" / "state_dict_keys.json").read_text())[name]
    whole = timm.create_model(name, kernel_size=KERNELS[name], **SMALL).state_dict()
    blocks = [key for key in official if re.match(r"(downsample_layers\.|stages\.\d\.0\.)", key)]
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.rand(whole[key].shape, generator=generator).to(whole[key].dtype) for key in blocks}
    for stage in range(4):
        state |= {f"norm{stage}.{part}": torch.randn(8, generator=generator) for part in ("weight", "bias")}
    detector = {f"backbone.{key}": tensor for key, tensor in state.items()}
    other = ("neck.lateral_convs.0.conv.weight", "rpn_head.rpn_cls.weight", "roi_head.bbox_head.0.fc_cls.weight")
    return {**detector, **{key: torch.randn(2, 2) for key in other}}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_backbone_of_a_detector_is_read(name: str, prefix: str, shared: Path, tmp_path: Path) -> None:
    detector = _official_detector(name, shared)
    meta = {"epoch": 36, "iter": 263000, "CLASSES": ("person", "bicycle"), "config": "model = dict(...)"}
    state = {prefix + key: tensor for key, tensor in detector.items()}
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "epoch_36.pth")
    settings = {**SMALL, "kernel_size": KERNELS[name], "features_only": True, "stage_norms": True}
    backbone = timm.create_model(name, **settings).eval()
    load_checkpoint(backbone, tmp_path / "epoch_36.pth")
    read = backbone.model.state_dict()
    assert len(read) == len(detector) - 3
    for key, tensor in read.items():
        torch.testing.assert_close(tensor, detector[f"backbone.{key}"], rtol=0, atol=0)
    features = backbone(torch.randn(1, 3, 64, 64))
    assert [tuple(feature.shape[1:]) for feature in features] == [(8, side, side) for side in (16, 8, 4, 2)]

    again = timm.create_model(name, **settings).eval()
    load_checkpoint(again.model, tmp_path / "epoch_36.pth")  # without the wrapper
    torch.testing.assert_close(dict(again.model.state_dict()), dict(read), rtol=0, atol=0)
    del detector["backbone.norm2.bias"]
    torch.save({"state_dict": detector}, tmp_path / "incomplete.pth")
    with pytest.raises(ValueError, match=r"incomplete\.pth does not fit .*: 1 missing: norm2\.bias"):
        load_checkpoint(again, tmp_path / "incomplete.pth")


@pytest.mark.parametrize("name", KERNELS)
def test_a_backbone_begins_with_the_weights_of_a_classifier(name: str, tmp_path: Path) -> None:
    """As fine-tuning does; the norms of the stages are new."""
    settings = {**SMALL, "kernel_size": KERNELS[name], "num_classes": 1000}
    classifier = timm.create_model(name, **settings).eval()
    torch.save({"model": classifier.state_dict()}, tmp_path / "trained.pth")
    del settings["num_classes"]
    overlay = {"file": str(tmp_path / "trained.pth")}
    backbone = timm.create_model(
        name, **settings, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, stage_norms=True
    )
    trained, read = classifier.state_dict(), backbone.model.state_dict()
    assert {key for key in read if key not in trained} == {
        f"norm{stage}.{part}" for stage in range(4) for part in ("weight", "bias")
    }
    for key in read:
        if key in trained:
            torch.testing.assert_close(read[key], trained[key], rtol=0, atol=0)
