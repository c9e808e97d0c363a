"""The networks as backbones of detectors and segmenters that pip installs: a step of training each, on toy data."""

import importlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from transformers import (
    DPTConfig,
    DPTForDepthEstimation,
    TimmBackboneConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

import sw_transplant.models  # noqa: F401
from sw_transplant import convert
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.sparsity import FilterSparsity
from tests.sampling import sample

SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20), "kernel_size": (13, 11, 9, 7, 3), "width_factor": 1.0}


class Pyramid(nn.Module):
    """A backbone with a feature pyramid, as the detectors of torchvision take it."""

    def __init__(self, name: str, channels: int = 16) -> None:
        super().__init__()
        self.body = timm.create_model(name, **SMALL, features_only=True, stage_norms=True)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), channels)
        self.out_channels = channels

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        return self.fpn(OrderedDict((str(i), features) for i, features in enumerate(self.body(x))))


@pytest.mark.parametrize("name", ["sw_tiny", "slak_tiny"])
def test_mask_rcnn_of_torchvision_takes_a_step(name: str) -> None:
    torch.manual_seed(0)
    detector = MaskRCNN(
        Pyramid(name), num_classes=3,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (48,), (64,)), ((1.0,),) * 4),
        min_size=64, max_size=64, box_detections_per_img=4,
        rpn_pre_nms_top_n_train=20, rpn_post_nms_top_n_train=10, box_batch_size_per_image=8,
    )  # fmt: skip
    boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0]])
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[0, 8:48, 8:40] = 1
    target = {"boxes": boxes, "labels": torch.tensor([1]), "masks": masks}
    losses = detector([torch.rand(3, 64, 64)], [target])
    sum(losses.values()).backward()
    assert detector.backbone.body.model.norm3.weight.grad is not None
    assert all(float(loss.detach()) >= 0 for loss in losses.values())


@pytest.fixture
def cascade(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "examples")
    return importlib.import_module("cascade_mask_rcnn")


def small_cascade(cascade: Any, name: str) -> nn.Module:
    torch.manual_seed(0)
    heads = {"width": 16, "batch_size_per_image": 16, "detections_per_img": 3, "score_thresh": 0.0}
    few = {"rpn_pre_nms_top_n_train": 40, "rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20}
    backbone = cascade.Pyramid(name, 16, **SMALL)
    return cascade.cascade_mask_rcnn(backbone, 3, (8, 16, 24, 32, 48), heads, min_size=64, max_size=64, **few)


@pytest.mark.parametrize("name", ["sw_tiny", "slak_tiny"])
def test_cascade_mask_rcnn_takes_a_step_in_all_its_heads(name: str, cascade: Any) -> None:
    detector = small_cascade(cascade, name)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    before = {key: parameter.detach().clone() for key, parameter in detector.named_parameters()}
    losses = detector(*cascade.draw(2, seed=0))
    kinds = ("loss_classifier", "loss_box_reg", "loss_mask")
    assert {f"{kind}_{number}" for kind in kinds for number in range(3)} < set(losses)
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    unmoved = [key for key, parameter in detector.named_parameters() if torch.equal(parameter, before[key])]
    assert all(".body.model.head" in key for key in unmoved), unmoved
    (result, _) = detector.eval()(cascade.draw(2, seed=1)[0])
    count = len(result["boxes"])
    assert 0 < count <= 3
    assert result["masks"].shape == (count, 1, 64, 64)
    assert bool((result["boxes"] >= 0).all() and (result["boxes"] <= 64).all())


def test_each_head_of_the_cascade_begins_with_the_boxes_of_the_one_before(cascade: Any) -> None:
    """By hand: the box moved by the likeliest kind's numbers, in the coder's units; and at least a pixel large."""
    detector = small_cascade(cascade, "sw_tiny")
    thresholds = [head.proposal_matcher.high_threshold for head in detector.roi_heads.heads]
    assert thresholds == [0.5, 0.6, 0.7]
    logits = torch.tensor([[9.0, 1.0, 2.0], [0.0, 3.0, 1.0]])
    moves = torch.zeros(2, 3, 4)
    moves[0, 2] = torch.tensor([2.0, -1.0, 0.0, 0.0])  # a tenth of the width, per head finer
    moves[1, 1] = torch.tensor([0.0, 0.0, -99.0, 0.0])  # nearly no width
    boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0], [4.0, 4.0, 8.0, 8.0]])
    for finer, head in enumerate(detector.roi_heads.heads, start=1):
        (found,) = cascade.refined(head, logits, moves.flatten(1), [boxes], [(64, 64)])
        wanted = boxes[0] + torch.tensor([4.0, -2.0, 4.0, -2.0]) / finer
        torch.testing.assert_close(found[0], wanted)
        assert found[1, 2] - found[1, 0] >= 1


@pytest.mark.parametrize("name", sample(["sw_tiny", "slak_tiny"], ["sw_tiny"]))
def test_dpt_of_transformers_learns_depth_from_one_image(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **k: create(name, **{**SMALL, "stage_norms": True, **k}))
    backbone = TimmBackboneConfig(backbone=name, out_indices=(0, 1, 2), use_pretrained_backbone=False)
    config = DPTConfig(
        is_hybrid=True, backbone_config=backbone, backbone_featmap_shape=[1, 16, 4, 4], image_size=64, patch_size=16,
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 12, 16, 16], fusion_hidden_size=16,
    )  # fmt: skip
    model = DPTForDepthEstimation(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ramp = torch.linspace(0, 1, 64)
    images = torch.stack([torch.stack([ramp.expand(64, 64)] * 3), torch.stack([ramp[:, None].expand(64, 64)] * 3)])
    losses = []
    for _ in range(15):  # the brighter, the further away
        loss = (model(images).predicted_depth - images[:, 0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    body = model.dpt.embeddings.backbone._backbone.model
    assert body.stages[2][0].gamma.grad is not None


@pytest.mark.parametrize("name", ["sw_tiny", "slak_tiny"])
def test_upernet_of_transformers_takes_a_step_with_its_zeros_fixed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **k: create(name, **{**SMALL, "stage_norms": True, **k}))
    backbone = TimmBackboneConfig(backbone=name, out_indices=(0, 1, 2, 3), use_pretrained_backbone=False)
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=4, auxiliary_in_channels=16, auxiliary_channels=8
    )
    segmenter = UperNetForSemanticSegmentation(config).train()
    if name == "slak_tiny":
        segmenter = convert(segmenter)  # banks of several tiles, in mode "laid_out"
        branches = [branch for m in segmenter.modules() if hasattr(m, "branches") for branch in m.branches]
        banks = [branch.bank for branch in branches if branch.tile_count[1] > 1]
    else:
        banks = [path.weight for m in segmenter.modules() if isinstance(m, SWConv2d) for path in m.paths]
    with torch.no_grad():
        for bank in banks:
            bank[::2] = 0
    sparsity = FilterSparsity.from_weights(segmenter, update_frequency=None)
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=1e-3)
    sparsity.attach(optimizer)
    out = segmenter(torch.randn(2, 3, 64, 64), labels=torch.randint(0, 4, (2, 64, 64)))
    assert out.logits.shape == (2, 4, 64, 64)
    out.loss.backward()
    optimizer.step()
    assert banks
    assert all(not bank[::2].any() and bank[1::2].any() for bank in banks)
