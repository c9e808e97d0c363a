"""Small models of transformers with large kernels, random weights, and the classes that read their folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.acceptance import randomise

SIZES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
STAGES = [f"stage{i}" for i in range(1, 5)]


@dataclass(frozen=True)
class Model:
    """One row of the table.

    Attributes:
        build: makes the model, with its default initialisation.
        layers: how many layers are converted.
        readers: names of the classes that read its folder, beside its own; the first may leave weights out (a head).
        size: of the images.
    """

    build: Callable[[], nn.Module]
    layers: int
    readers: tuple[str, ...] = ()
    size: int = 64

    def model(self) -> Any:
        """In eval mode, every number in it random, the same at every call."""
        torch.manual_seed(0)
        return randomise(self.build().eval())

    def images(self) -> Tensor:
        return torch.randn(2, 3, self.size, self.size, generator=torch.Generator().manual_seed(7))


def _mask2former() -> nn.Module:
    config = hf.Mask2FormerConfig(
        backbone_config=hf.ConvNextConfig(out_features=STAGES, **SIZES),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        dim_feedforward=16,
        num_attention_heads=2,
        num_queries=4,
        num_labels=3,
    )
    return hf.Mask2FormerForUniversalSegmentation(config)


def _upernet() -> nn.Module:
    backbone = hf.ConvNextConfig(out_features=STAGES, **SIZES)
    config = hf.UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_in_channels=24, auxiliary_channels=8, num_labels=3
    )
    return hf.UperNetForSemanticSegmentation(config)


def _focalnet() -> nn.Module:
    config = hf.FocalNetConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], focal_levels=[4, 4, 3, 3], num_labels=5)
    return hf.FocalNetForImageClassification(config)


_IMAGES = ("AutoModel", "AutoModelForImageClassification", "AutoBackbone")

MODELS = {
    "ConvNext": Model(lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(num_labels=5, **SIZES)), 4, _IMAGES),
    "ConvNextV2": Model(
        lambda: hf.ConvNextV2ForImageClassification(hf.ConvNextV2Config(num_labels=5, **SIZES)), 4, _IMAGES
    ),
    "DINOv3": Model(lambda: hf.DINOv3ConvNextModel(hf.DINOv3ConvNextConfig(**SIZES)), 4, ("AutoModel", "AutoBackbone")),
    "FocalNet": Model(_focalnet, 6, _IMAGES),
    "TimmWrapper": Model(
        lambda: hf.TimmWrapperForImageClassification(
            hf.TimmWrapperConfig(architecture="test_convnext", num_labels=5, model_args={"kernel_sizes": 9})
        ),
        9,
        ("AutoModel", "AutoModelForImageClassification"),
    ),
    "UperNet": Model(_upernet, 4, ("AutoModelForSemanticSegmentation",)),
    "Mask2Former": Model(_mask2former, 4, ("AutoModelForUniversalSegmentation", "AutoModel")),
}
