"""Sizes of segmenters and detectors in both papers, counted with the heads of other libraries around the networks."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from transformers import TimmBackboneConfig, UperNetConfig, UperNetForSemanticSegmentation

import sw_transplant.models  # noqa: F401
from sw_transplant.layers.sw_conv2d import SWConv2d
from tests.sampling import sample

UPERNET = [  # millions, and thousand millions at 2048 x 512; the share of the backbone that is in use
    ("convnext_tiny", 1.0, 60, 939),
    ("convnext_small", 1.0, 82, 1027),
    ("convnext_base", 1.0, 122, 1170),
    ("slak_tiny", 0.6, 65, 936),
    ("slak_small", 0.6, 91, 1028),
    ("slak_base", 0.6, 135, 1172),
    ("sw_tiny", 1.0, 62, None),
    ("sw_small", 1.0, 88, None),
]
FASTER_RCNN = [("convnext_tiny", 1.0, 45, 208), ("slak_tiny", 0.6, 49, 205)]  # at 1280 x 800


def millions(model: nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def multiplications(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() / 2e9


def check(name: str, found: tuple[float, float], parameters: int, flops: int | None) -> None:
    """ConvNeXt's are the papers' numbers: the heads are alike. SLaK's layers are not all 60% in use."""
    sparse = name.startswith("slak")
    assert found[0] == pytest.approx(parameters, abs=4.1 if sparse else 1.1)
    if flops is not None:
        assert found[1] == pytest.approx(flops, rel=0.1 if sparse else 0.005)


@pytest.mark.parametrize(
    ("name", "in_use", "parameters", "flops"),
    sample(UPERNET, UPERNET[:1]),
)
def test_upernet_on_ade20k(
    name: str, in_use: float, parameters: int, flops: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLaK, Table 4; SW's table of segmentation."""
    create, settings = timm.create_model, {} if name.startswith("convnext") else {"stage_norms": True}
    monkeypatch.setattr(timm, "create_model", lambda name, **given: create(name, **settings, **given))
    with torch.device("meta"):
        channels = timm.create_model(name, features_only=True).feature_info.channels()
        backbone = TimmBackboneConfig(backbone=name, out_indices=(0, 1, 2, 3), use_pretrained_backbone=False)
        config = UperNetConfig(
            backbone_config=backbone, num_labels=150, hidden_size=512,
            auxiliary_in_channels=channels[2], auxiliary_channels=256,
        )  # fmt: skip
        segmenter = UperNetForSemanticSegmentation(config).eval()
        image = torch.zeros(1, 3, 512, 2048)
    for module in segmenter.modules():
        if isinstance(module, SWConv2d):
            module.form, module.residual = "shift", False
    body = multiplications(lambda: segmenter.backbone(image))
    features = segmenter.backbone(image).feature_maps
    head = multiplications(lambda: segmenter.decode_head(features))
    weights = millions(segmenter) - (1 - in_use) * millions(segmenter.backbone)
    check(name, (weights, in_use * body + head), parameters, flops)


class Pyramid(nn.Module):
    out_channels = 256

    def __init__(self, name: str) -> None:
        super().__init__()
        settings = {} if name.startswith("convnext") else {"stage_norms": True}
        self.body = timm.create_model(name, features_only=True, **settings)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 256, LastLevelMaxPool())


@pytest.mark.parametrize(("name", "in_use", "parameters", "flops"), sample(FASTER_RCNN, []))
def test_faster_rcnn_on_voc(name: str, in_use: float, parameters: int, flops: int) -> None:
    """SLaK, Table 5, with a thousand boxes."""
    with torch.device("meta"):
        anchors = AnchorGenerator(tuple((2**i,) for i in range(5, 10)), ((0.5, 1.0, 2.0),) * 5)
        detector = FasterRCNN(Pyramid(name), 21, rpn_anchor_generator=anchors).eval()
        image, boxes = torch.zeros(1, 3, 800, 1280), torch.zeros(1000, 256, 7, 7)
    pyramid, heads = detector.backbone, detector.roi_heads
    maps = pyramid.body(image)
    body = multiplications(lambda: pyramid.body(image))
    levels = pyramid.fpn(OrderedDict((str(i), features) for i, features in enumerate(maps)))
    rest = multiplications(lambda: pyramid.fpn(OrderedDict((str(i), features) for i, features in enumerate(maps))))
    rest += multiplications(lambda: detector.rpn.head(list(levels.values())))
    rest += multiplications(lambda: heads.box_predictor(heads.box_head(boxes)))
    weights = millions(detector) - (1 - in_use) * millions(pyramid.body)
    check(name, (weights, in_use * body + rest), parameters, flops)
