"""How the networks here enter timm: their preprocessing and the builder behind every entry point."""

from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import nn

__all__ = ["build", "preprocessing"]


def preprocessing(first_conv: str, size: int = 224, **settings: Any) -> dict[str, Any]:
    """The preprocessing a published size was evaluated with.

    Inputs of 384 and more are resized without cropping, smaller ones cropped out of a frame 8/7 as wide.
    """
    cropping = {"crop_pct": 1.0, "crop_mode": "squash"} if size >= 384 else {"crop_pct": 0.875}
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head",
        **cropping,
        **settings,
    }


def build(model_class: type[nn.Module], variant: str, pretrained: bool, geometry: dict[str, Any], **kwargs: Any) -> Any:
    """Build `variant` through timm; `kwargs` override `geometry`. Returns the network, or timm's feature wrapper.

    No weights are hosted, so ``pretrained=True`` needs a file: ``pretrained_cfg_overlay={'file': ...}``.
    """
    feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    return build_model_with_cfg(model_class, variant, pretrained, feature_cfg=feature_cfg, **{**geometry, **kwargs})
