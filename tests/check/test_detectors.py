"""verify of models whose outputs are as long as what they find: a clear verdict, or what to do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sw_transplant as sw

torchvision = pytest.importorskip("torchvision")


class Detector(nn.Module):
    """Boxes wherever a map of scores is above a threshold, a list of dictionaries as torchvision's detectors give."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.backbone = nn.Conv2d(3, 3, 9, padding=4, groups=3)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        found = []
        for scores in self.backbone(x).mean(1).abs():
            places = (scores > self.threshold).nonzero()
            kept = scores[scores > self.threshold]
            boxes = torch.cat([places, places + 8], dim=1).to(scores) + kept[:, None]
            found.append({"boxes": boxes, "scores": kept, "labels": torch.ones(len(places), dtype=torch.int64)})
        return found


def detector(threshold: float) -> Detector:
    torch.manual_seed(0)
    return Detector(threshold).eval()


def changed(model: nn.Module, by: float) -> nn.Module:
    converted = sw.convert(model)
    with torch.no_grad():
        converted.backbone.branches[0].bank[:, 0, 0, 0] += by
    return converted


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_lists_of_dictionaries_of_different_lengths() -> None:
    model = detector(0.3)
    assert len({len(found["scores"]) for found in model(IMAGES)}) == 3
    report = sw.verify(model, sw.convert(model), IMAGES)
    assert report.ok
    names = [f"output[{image}].{what}" for image in range(3) for what in ("boxes", "scores")]
    assert [output.name for output in report.outputs] == names
    assert report.not_compared == tuple(f"output[{image}].labels" for image in range(3))
    assert not sw.verify(model, changed(model, 1e-4), IMAGES).ok  # which finds the same, with other scores


def test_another_number_of_detections() -> None:
    model = detector(0.3)
    with pytest.raises(ValueError, match=r"output\[0\]\.boxes has \d+ rows .* \d+ .*verify\(original\.backbone"):
        sw.verify(model, changed(model, 1.0), IMAGES)
    assert not sw.verify(model.backbone, changed(model, 1.0).backbone, IMAGES).ok


def test_nothing_is_found() -> None:
    """Two detectors that find nothing would agree on everything."""
    model = detector(9.0)
    assert all(not len(found["scores"]) for found in model(IMAGES))
    for converted in (sw.convert(model), changed(model, 1.0)):
        with pytest.raises(ValueError, match=r"all outputs are empty \(output\[0\]\.boxes, .*lower its threshold"):
            sw.verify(model, converted, IMAGES)


def test_detections_in_16_bits() -> None:
    """What passes a threshold in 16 bits is not what passes it in wide numbers."""
    model = detector(0.3)
    with pytest.raises(ValueError, match=r"in wide numbers .*Verify in float32"):
        sw.verify(model, sw.convert(model), IMAGES, dtype=torch.bfloat16)


class Backbone(nn.Module):
    """A small network with large kernels, as a backbone of torchvision's detectors."""

    out_channels = 16

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.depthwise = nn.Conv2d(16, 16, 7, padding=3, groups=16)
        self.norm, self.pointwise = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.pointwise(self.norm(self.depthwise(x)).relu())


def test_mask_rcnn() -> None:
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(0)
    model = MaskRCNN(
        Backbone(), num_classes=3, min_size=48, max_size=64, box_detections_per_img=6, rpn_post_nms_top_n_test=20,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((0.5, 1.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2), mask_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
    ).eval()  # fmt: skip
    converted, images = sw.convert(model), torch.randn(2, 3, 48, 48)
    assert sw.set_form(converted, "toeplitz") == ["backbone.depthwise"]  # which rounds in another order
    report = sw.verify(model, converted, images)
    assert report.ok
    assert {output.name.rpartition(".")[2] for output in report.outputs} == {"boxes", "scores", "masks"}
    with torch.no_grad():
        converted.backbone.depthwise.branches[0].bank[:, 0, 0, 0] += 0.5
    assert not sw.verify(model, converted, images).ok
