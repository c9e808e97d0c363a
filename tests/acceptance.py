"""The models that a conversion must preserve, and what it takes to compare two of them.

One table, random weights, nothing is downloaded. Default initialisation would hide most errors (layer scales of 1e-6,
BatchNorms that do nothing): :func:`randomise` gives every parameter and every statistic a value that matters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
import transformers as hf
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.models.sam2_video.configuration_sam2_video import Sam2VideoConfig
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoMemoryFuser

from sw_transplant import ShiftwiseConv2d
from sw_transplant.models import RepLKNet, SLaK, UniRepLKNet


@dataclass(frozen=True)
class Case:
    """One model of the table.

    Attributes:
        name: unique, for test ids.
        build: makes the model, with its default initialisation.
        layers: how many layers are converted, by ``min_kernel``; 0 where nothing can be found.
        sizes: the two image sizes to compare at.
        small: a size for what needs only one.
        keyword: how the model takes its images; None for the first positional argument.
        channels: of the images.
        doubled: the modes ("eval", "train") that are compared in float64: with random weights the model amplifies
            the rounding of float32 past the bound; the original differs from itself on another number of threads.
    """

    name: str
    build: Callable[[], nn.Module]
    layers: Mapping[int, int]
    sizes: tuple[int, int] = (160, 192)
    small: int = 96
    keyword: str | None = None
    channels: int = 3
    doubled: tuple[str, ...] = ()

    def dtype(self, mode: str) -> torch.dtype:
        """What the model is compared in, in "eval" or in "train" mode."""
        return torch.float64 if mode in self.doubled else torch.float32

    def model(self) -> nn.Module:
        """The model in eval mode, every number in it random, the same at every call."""
        torch.manual_seed(0)
        return randomise(self.build().eval()).to(self.dtype("eval"))

    def images(self, size: int, *, batch: int = 1) -> Tensor:
        """Seeded normal noise ``(batch, channels, size, size)``."""
        generator = torch.Generator().manual_seed(size)
        return torch.randn(batch, self.channels, size, size, generator=generator).to(self.dtype("eval"))

    def run(self, model: nn.Module, images: Tensor, **arguments: Any) -> Any:
        """The model's output as it comes."""
        return model(images, **arguments) if self.keyword is None else model(**{self.keyword: images}, **arguments)


def _timm(
    architecture: str,
    layers: Mapping[int, int],
    sizes: tuple[int, int] = (160, 192),
    *,
    small: int = 96,
    doubled: tuple[str, ...] = (),
    **kw: Any,
) -> Case:
    name = " ".join(["timm", architecture, *(f"{key}={value}" for key, value in kw.items())])
    return Case(name, lambda: timm.create_model(architecture, **kw), layers, sizes, small, doubled=doubled)


def _hf(
    name: str, build: Callable[[], nn.Module], layers: Mapping[int, int], sizes: tuple[int, int], **kw: Any
) -> Case:
    return Case(f"hf {name}", build, layers, sizes, keyword="pixel_values", **kw)


_SMALL = {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1]}
_STAGES = [f"stage{i}" for i in range(1, 5)]
_PYRAMID: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 10}


def _focalnet() -> nn.Module:
    config = hf.FocalNetConfig(embed_dim=32, depths=[1, 1, 2, 1], focal_levels=[4, 4, 4, 4])
    return hf.FocalNetForImageClassification(config)


def _upernet() -> nn.Module:
    backbone = hf.ConvNextConfig(out_features=_STAGES, **_SMALL)
    config = hf.UperNetConfig(backbone_config=backbone, hidden_size=32, auxiliary_in_channels=96, auxiliary_channels=32)
    return hf.UperNetForSemanticSegmentation(config)


def _timm_wrapper() -> nn.Module:
    return hf.TimmWrapperForImageClassification(hf.TimmWrapperConfig(architecture="convnext_atto", num_labels=10))


def _efficientnet() -> nn.Module:
    config = hf.EfficientNetConfig(image_size=224, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280)
    return hf.EfficientNetForImageClassification(config)


def _replknet() -> nn.Module:
    return RepLKNet((31, 29, 27, 13), (1, 1, 2, 1), (8, 16, 24, 32), small_kernel=5, num_classes=10)


CASES = (
    _timm("convnext_atto", {7: 12}),
    _timm("convnextv2_atto", {7: 12}),
    _timm("convnext_zepto_rms", {7: 10}),
    _timm("convnext_atto", {7: 12}, kernel_sizes=31),
    _timm("convnext_atto", {7: 12}, features_only=True),
    _timm("convnext_atto", {7: 12}, drop_path_rate=0.1),
    _timm("inception_next_atto", {7: 24}),
    _timm("mixnet_s", {7: 14, 5: 27}),
    _timm("fastvit_t8", {7: 13}, (256, 224)),
    _timm("fastvit_sa12", {7: 16}, (256, 224)),
    _timm("convmixer_768_32", {7: 32}, (112, 96), small=64, doubled=("train",)),
    _timm("edgenext_xx_small", {7: 6, 5: 7}, (256, 224)),
    _timm("maxxvitv2_nano_rw_256", {7: 7}, (256, 256), small=256),
    _timm("starnet_s050", {7: 12}),
    _timm("iformer_t", {7: 11}, (224, 224), small=224, doubled=("train",)),
    _timm("coat_lite_tiny", {7: 4, 5: 8}, (224, 224), small=224),
    _timm("efficientvit_m1", {7: 6, 5: 12}, (224, 224), small=224, doubled=("eval", "train")),
    _timm("focalnet_tiny_srf", {7: 0, 5: 12}, (224, 192)),
    _timm("mambaout_femto", {7: 18}),
    Case("torchvision convnext_tiny", lambda: torchvision.models.convnext_tiny(weights=None), {7: 18}),
    _hf(
        "ConvNextForImageClassification drop_path_rate=0.1",
        lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(drop_path_rate=0.1, **_SMALL)),
        {7: 5},
        (160, 192),
    ),
    _hf(
        "ConvNextV2Backbone",
        lambda: hf.ConvNextV2Backbone(hf.ConvNextV2Config(out_features=["stage2", "stage4"], **_SMALL)),
        {7: 5},
        (160, 192),
    ),
    _hf("DINOv3ConvNextModel", lambda: hf.DINOv3ConvNextModel(hf.DINOv3ConvNextConfig(**_SMALL)), {7: 5}, (160, 192)),
    _hf("FocalNetForImageClassification", _focalnet, {7: 10, 5: 15}, (224, 192)),
    _hf("UperNet with ConvNeXt", _upernet, {7: 5}, (224, 256)),
    _hf("TimmWrapper convnext_atto", _timm_wrapper, {7: 12}, (160, 192)),
    _hf("EfficientNet b0", _efficientnet, {7: 0, 5: 9}, (224, 192)),
    Case(
        "hf Sam2VideoMemoryFuser",
        lambda: Sam2VideoMemoryFuser(Sam2VideoConfig()),
        {7: 2},
        (32, 40),
        small=32,
        channels=256,
    ),
    Case("SLaK", lambda: SLaK(kernel_size=(51, 49, 47, 13, 5), drop_path_rate=0.1, **_PYRAMID), {7: 5}, (96, 128)),
    Case("RepLKNet", _replknet, {7: 5}, (96, 128)),
    Case("UniRepLKNet", lambda: UniRepLKNet(kernel_sizes=((3,), (13,), (13, 3), (13,)), **_PYRAMID), {7: 3}, (96, 128)),
)


def case(name: str) -> Case:
    """The case of this name."""
    return next(one for one in CASES if one.name == name)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    """Gives every parameter and BatchNorm statistic a random value of a size that matters, in place.

    Kernels and matrices keep the variance of their input; scales lie in 0.5 to 1.5, biases and means around 0.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(_random_values(name, parameter, generator))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def _random_values(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    if name.endswith("bias"):
        return 0.1 * noise
    if sum(size > 1 for size in parameter.shape) <= 1:  # one number per channel: a scale
        return torch.rand(parameter.shape, generator=generator) + 0.5
    if parameter.shape[0] == 1:  # a position embedding
        return 0.1 * noise
    return noise * (parameter.shape[0] / parameter.numel()) ** 0.5


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors in whatever a model returns."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def relative_rms(got: Tensor, expected: Tensor) -> float:
    """``||got - expected|| / ||expected||``; NaN or infinite where anything is not finite, so that no bound holds."""
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm())


def largest_error(got: Any, expected: Any) -> float:
    """The largest relative RMS error among the tensors of two outputs.

    Raises:
        ValueError: the outputs differ in structure or shapes, or an expected tensor is zero or not finite.
    """
    pairs = list(zip(tensors_of(got), tensors_of(expected), strict=True))
    if not pairs:
        raise ValueError("the output holds no floating-point tensor")
    for one, other in pairs:
        if one.shape != other.shape or not other.isfinite().all() or not other.any():
            raise ValueError(f"got {tuple(one.shape)}, expected a finite map, not all zeros, of {tuple(other.shape)}")
    errors = [relative_rms(one, other) for one, other in pairs]
    return max(float("inf") if error != error else error for error in errors)


def shiftwise_layers(model: nn.Module) -> dict[str, ShiftwiseConv2d]:
    """The converted layers of a model by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ShiftwiseConv2d)}


def with_form(model: nn.Module, form: str) -> nn.Module:
    """The same model, every converted layer running in this form."""
    for layer in shiftwise_layers(model).values():
        layer.form = form
    return model


def broken(model: nn.Module) -> nn.Module:
    """A copy of a converted model in which every tap of the last layer's largest kernel is one place off."""
    twin = copy.deepcopy(model)
    layer = list(shiftwise_layers(twin).values())[-1]
    branch = max(layer.branches, key=lambda one: one.index.numel())
    with torch.no_grad():
        branch.bank.copy_(branch.bank.flatten(1).roll(1, dims=1).view_as(branch.bank))
    return twin
