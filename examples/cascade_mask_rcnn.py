"""Cascade Mask R-CNN, the detector of both papers, around one of the networks: torchvision's parts, three times.

    python examples/cascade_mask_rcnn.py                           # a small network, on shapes that are drawn here
    python examples/cascade_mask_rcnn.py --network slak_tiny

Three heads follow each other; each begins with the boxes of the one before, and is trained on boxes that overlap the
true ones more. The published detectors are made with MMDetection; theirs differ in the boxes' heads and losses, so that
weights of whole detectors do not load here; those of backbones do, see docs/reproducing.md. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.boxes import clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import sw_transplant.models  # noqa: F401  registers the networks

OVERLAPS = (0.5, 0.6, 0.7)
"""From which intersection over union on a box counts as found, in the training of each head."""
WEIGHTS = (1.0, 0.5, 0.25)
"""Of each head's losses."""
LEVELS = ("0", "1", "2", "3")
SMALL = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40), "kernel_size": (13, 11, 9, 7, 3), "width_factor": 1.0}


class Pyramid(nn.Module):
    """A network's four stages, each through its own norm, in a feature pyramid of five levels."""

    def __init__(self, network: str, channels: int = 256, **settings: Any) -> None:
        super().__init__()
        self.body = timm.create_model(network, features_only=True, stage_norms=True, **settings)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), channels, LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(OrderedDict(zip(LEVELS, self.body(x), strict=True)))


class CascadeHeads(nn.Module):
    """What torchvision's detectors call ``roi_heads``: three of them, one after the other (Cai & Vasconcelos, 2018).

    Args:
        channels: of the pyramid.
        classes: with the background.
        width: of the boxes' heads.
        settings: of each head: ``batch_size_per_image``, ``detections_per_img``, ...
    """

    def __init__(self, channels: int, classes: int, width: int = 1024, **settings: Any) -> None:
        super().__init__()
        given = {"batch_size_per_image": 512, "positive_fraction": 0.25, "score_thresh": 0.05, "nms_thresh": 0.5}
        given |= {"detections_per_img": 100, **settings}
        self.heads = nn.ModuleList(
            RoIHeads(
                MultiScaleRoIAlign(LEVELS, 7, 2), TwoMLPHead(channels * 49, width), FastRCNNPredictor(width, classes),
                fg_iou_thresh=overlap, bg_iou_thresh=overlap,
                bbox_reg_weights=tuple(finer * weight for weight in (10.0, 10.0, 5.0, 5.0)),
                mask_roi_pool=MultiScaleRoIAlign(LEVELS, 14, 2),
                mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
                mask_predictor=MaskRCNNPredictor(channels, channels, classes), **given,
            )
            for finer, overlap in enumerate(OVERLAPS, start=1)
        )  # fmt: skip

    def forward(
        self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]], targets: Any = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        losses: dict[str, Tensor] = {}
        scores: list[Tensor] = []
        for number, (head, weight) in enumerate(zip(self.heads, WEIGHTS, strict=True)):
            if self.training:
                found = head(features, boxes, sizes, targets)[1]
                losses |= {f"{name}_{number}": weight * loss for name, loss in found.items()}
            with torch.no_grad():
                logits, moves = head.box_predictor(head.box_head(head.box_roi_pool(features, boxes, sizes)))
                scores.append(logits.softmax(1))
                start, boxes = boxes, refined(head, logits, moves, boxes, sizes)
        if self.training:
            return [], losses
        mean = torch.stack(scores).mean(0).log()  # of all heads; boxes of the last one
        found = head.postprocess_detections(mean, moves, start, sizes)
        results = [dict(zip(("boxes", "scores", "labels"), each, strict=True)) for each in zip(*found, strict=True)]
        labels, areas = [each["labels"] for each in results], [each["boxes"] for each in results]
        masks = [
            maskrcnn_inference(head.mask_predictor(head.mask_head(head.mask_roi_pool(features, areas, sizes))), labels)
            for head in self.heads
        ]
        for result, each in zip(results, zip(*masks, strict=True), strict=True):
            result["masks"] = torch.stack(each).mean(0)
        return results, {}


def refined(
    head: RoIHeads, logits: Tensor, moves: Tensor, boxes: list[Tensor], sizes: list[tuple[int, int]]
) -> list[Tensor]:
    """Each box moved as the head says for its likeliest kind of thing; at least a pixel high and wide."""
    moved = head.box_coder.decode(moves, boxes)  # (N, classes, 4)
    likeliest = logits[:, 1:].argmax(1) + 1
    chosen = moved[torch.arange(len(moved)), likeliest].split([len(each) for each in boxes])
    clipped = [clip_boxes_to_image(each, size) for each, size in zip(chosen, sizes, strict=True)]
    return [torch.cat([each[:, :2], torch.maximum(each[:, 2:], each[:, :2] + 1)], 1) for each in clipped]


def cascade_mask_rcnn(
    backbone: Pyramid, classes: int, sides: tuple[int, ...], heads: dict[str, Any], **settings: Any
) -> MaskRCNN:
    """The detector; `settings` are those of torchvision's MaskRCNN, `sides` those of the anchors of the five levels."""
    anchors = AnchorGenerator(tuple((side,) for side in sides), ((0.5, 1.0, 2.0),) * len(sides))
    detector = MaskRCNN(backbone, classes, rpn_anchor_generator=anchors, **settings)
    detector.roi_heads = CascadeHeads(backbone.out_channels, classes, **heads)
    return detector


def draw(count: int, seed: int, size: int = 64) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images with one bright rectangle or diamond each, and where it is."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.arange(size)[:, None], torch.arange(size)
    images, targets = [], []
    for _ in range(count):
        half, kind = (
            int(torch.randint(10, 16, (), generator=generator)),
            int(torch.randint(1, 3, (), generator=generator)),
        )
        y, x = (int(torch.randint(half, size - half, (), generator=generator)) for _ in range(2))
        up, across = (rows - y).abs(), (columns - x).abs()
        mask = (up.maximum(across) if kind == 1 else up + across) <= half
        image = 0.2 * torch.rand(3, size, size, generator=generator) + 0.7 * mask
        box = torch.tensor([[x - half, y - half, x + half, y + half]], dtype=torch.float32)
        images.append(image)
        targets.append({"boxes": box, "labels": torch.tensor([kind]), "masks": mask[None].to(torch.uint8)})
    return images, targets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="sw_tiny", help="sw_tiny, slak_tiny, ... of few channels")
    parser.add_argument("--steps", type=int, default=250)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    heads = {"width": 64, "batch_size_per_image": 32, "detections_per_img": 5}
    sampling = {"rpn_pre_nms_top_n_train": 100, "rpn_post_nms_top_n_train": 50, "rpn_batch_size_per_image": 64}
    backbone = Pyramid(arguments.network, 32, layer_scale_init_value=1.0, **SMALL)
    detector = cascade_mask_rcnn(backbone, 3, (8, 16, 24, 32, 48), heads, min_size=64, max_size=64, **sampling)
    optimizer = torch.optim.AdamW(detector.parameters(), 1e-3, weight_decay=0.05)
    history = []
    for step in range(arguments.steps):
        losses = detector(*draw(4, seed=step))
        optimizer.zero_grad()
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        optimizer.step()
        history.append(total.item())
        if step % 10 == 9:
            print(f"step {step + 1}: loss {sum(history[-10:]) / 10:.3f}")
    images, targets = draw(16, seed=10_000)
    with torch.no_grad():
        results = detector.eval()(images)
    found = 0
    for result, target in zip(results, targets, strict=True):
        if len(result["masks"]):  # the surest
            seen, true = result["masks"][0, 0] > 0.5, target["masks"][0].bool()
            found += int((seen & true).sum() / (seen | true).sum() > 0.5)
    print(f"masks found: {found} of {len(images)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
