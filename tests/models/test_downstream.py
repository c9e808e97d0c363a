"""The networks as backbones of detectors and segmenters that pip installs: a step of training each, on toy data."""

from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from transformers import TimmBackboneConfig, UperNetConfig, UperNetForSemanticSegmentation

import sw_transplant.models  # noqa: F401
from sw_transplant import convert
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.sparsity import FilterSparsity

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
