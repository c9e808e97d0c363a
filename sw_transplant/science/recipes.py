"""How the published networks were trained, as data: on ImageNet-1k from scratch, and downstream.

Sources: SLaK, appendix A; ShiftwiseConv, appendix C with Table 8; and, where the texts are silent, the training
commands and configurations that the authors published. ``None`` where none of these says anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Pruning:
    """How filters or weights go out of use, and back: the arguments of :class:`sparsity.FilterSparsity`.

    Attributes:
        sparsity: the share out of use.
        only_L: large kernels only.
        prune_rate: the share of the used ones that one update exchanges at the start.
        update_frequency: u, steps from one update to the next.
        sparse_gap: parallel paths are synchronised in every so many-th update; None where there are none.
    """

    sparsity: float
    only_L: bool
    prune_rate: float
    update_frequency: int
    sparse_gap: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A training from scratch on ImageNet-1k: AdamW, cosine schedule, 224 x 224.

    Attributes:
        model: name of timm.
        epochs, warmup_epochs: the whole, and the linear warm-up in it.
        batch_size: of all processes and accumulated steps together.
        lr, min_lr, weight_decay: of AdamW; weight decay not for biases and one-dimensional parameters.
        layer_decay: factor on the learning rate from one group of layers to the one before (:func:`layer_group`).
        drop_path: stochastic depth of the last block. None for SW-S, which is trained here without: neither its Table 8
            nor any text says a rate, only that those of UniRepLKNet, which its settings follow, are higher than SLaK's.
        layer_scale: initial layer scale.
        mixup, cutmix: their alphas.
        smoothing: of labels.
        auto_augment: RandAugment, in timm's words.
        color_jitter, erasing: random erasing by pixels, its probability.
        ema_decay: of the averaged weights; None for no average.
        bn_pass: one more pass over the training images for the BatchNorms' statistics of the averaged weights.
        pruning: None for a dense training.
    """

    model: str
    epochs: int
    warmup_epochs: int
    drop_path: float | None
    batch_size: int = 4096
    lr: float = 4e-3
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    layer_scale: float = 1e-6
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    erasing: float = 0.25
    ema_decay: float | None = None
    bn_pass: bool = False
    pruning: Pruning | None = None


@dataclass(frozen=True)
class Downstream:
    """A fine-tuning of a detector or a segmenter on top of a pretrained network, with AdamW.

    Attributes:
        model: name of timm of the backbone.
        task: data set and head.
        length: of the training: ``"36 epochs"`` or ``"160000 iterations"``.
        batch_size: of all processes.
        lr, weight_decay: of AdamW.
        layer_decay, layers: factor on the learning rate, and into how many groups :func:`layer_group` divides; None
            for no groups.
        drop_path: of the backbone.
        images: their size in training.
        schedule: of the learning rate.
    """

    model: str
    task: str
    length: str
    batch_size: int
    lr: float
    weight_decay: float
    layer_decay: float
    layers: int | None
    drop_path: float
    images: str
    schedule: str


_SLAK = Recipe("slak_tiny", 300, 20, 0.1, ema_decay=0.9999, bn_pass=True, pruning=Pruning(0.4, False, 0.5, 2000))
_SLAK_S = replace(_SLAK, model="slak_small", drop_path=0.4, pruning=Pruning(0.4, False, 0.3, 100))
_SLAK_B = replace(_SLAK_S, model="slak_base", drop_path=0.5)
_SW = Recipe("sw_tiny", 300, 5, 0.2, pruning=Pruning(0.3, True, 0.3, 100, 131))
_SW_S = replace(_SW, model="sw_small", drop_path=None)

RECIPES: dict[str, Recipe] = {
    f"{recipe.model}_{epochs}": replace(recipe, epochs=epochs)
    for recipe in (_SLAK, _SLAK_S, _SLAK_B, _SW, _SW_S)
    for epochs in (120, 300)
}
"""``slak_tiny_120``, ``slak_tiny_300``, ..., ``sw_small_300``. The two of a network differ in their epochs alone."""


def timm_settings(recipe: Recipe, *, processes: int = 8, batch_size: int = 64) -> dict[str, Any]:
    """A recipe in the words of timm's ``train.py``, whose ``--config`` reads them as YAML.

    Pruning, the zeros of averaged weights and the BatchNorms' pass over the training images are not in them. The cosine
    begins after the warm-up; timm then counts its epochs without that.

    Args:
        recipe: one of :data:`RECIPES`.
        processes: of distributed training.
        batch_size: images of one process at once; steps are accumulated up to the recipe's batch.
    """
    settings = {
        "model": recipe.model,
        "epochs": recipe.epochs - recipe.warmup_epochs,  # timm adds the warm-up to them, as warmup_prefix says
        "warmup_epochs": recipe.warmup_epochs,
        "warmup_prefix": True,
        "batch_size": batch_size,
        "grad_accum_steps": max(1, recipe.batch_size // (processes * batch_size)),
        "opt": "adamw",
        "sched": "cosine",
        "lr": recipe.lr,
        "min_lr": recipe.min_lr,
        "warmup_lr": 0.0,
        "weight_decay": recipe.weight_decay,
        "layer_decay": None if recipe.layer_decay == 1 else recipe.layer_decay,
        "drop_path": recipe.drop_path,
        "mixup": recipe.mixup,
        "cutmix": recipe.cutmix,
        "smoothing": recipe.smoothing,
        "aa": recipe.auto_augment,
        "color_jitter": recipe.color_jitter,
        "reprob": recipe.erasing,
        "remode": "pixel",
        "train_interpolation": "bicubic",
        "model_ema": recipe.ema_decay is not None or None,
        "model_ema_decay": recipe.ema_decay,
        "img_size": 224,
        "cooldown_epochs": 0,
        "sched_on_updates": True,
    }
    return {key: "true" if value is True else value for key, value in settings.items() if value is not None}


_COCO = "COCO, Cascade Mask R-CNN"
_SCALES = "shorter side 480 to 800, longer side at most 1333"
_ADE = "ADE20K, UperNet"
_POLY = "1500 iterations of warm-up, then linearly to 0"
_STEPS = "divided by 10 after three quarters and eleven twelfths"

DOWNSTREAM: dict[str, Downstream] = {
    "slak_tiny_coco_1x": Downstream(
        "slak_tiny", _COCO, "12 epochs", 16, 2e-4, 0.05, 0.7, 6, 0.4, _SCALES, "divided by 10 after epochs 8 and 11"
    ),
    "slak_tiny_coco_3x": Downstream("slak_tiny", _COCO, "36 epochs", 16, 2e-4, 0.05, 0.7, 6, 0.4, _SCALES, _STEPS),
    "slak_tiny_voc": Downstream(
        "slak_tiny", "PASCAL VOC 2007, Faster R-CNN", "36 epochs", 16, 1e-4, 0.05, 1.0, None, 0.1, _SCALES, _STEPS
    ),
    "slak_tiny_ade20k": Downstream(
        "slak_tiny", _ADE, "160000 iterations", 16, 1e-4, 0.05, 0.9, 6, 0.4, "512 x 512 crops", _POLY
    ),
    "sw_tiny_coco_3x": Downstream("sw_tiny", _COCO, "36 epochs", 16, 1e-4, 0.05, 0.8, 12, 0.4, _SCALES, _STEPS),
    "sw_tiny_ade20k": Downstream(
        "sw_tiny", _ADE, "160000 iterations", 16, 1e-4, 0.05, 1.0, 9, 0.4, "512 x 512 crops", _POLY
    ),
    "sw_small_nuscenes": Downstream(
        "sw_small", "nuScenes, FCOS3D", "12 epochs", 16, 1e-4, 0.05, 0.8, 12, 0.5, "1600 x 900",
        "500 iterations of warm-up, divided by 10 after epochs 8 and 11",
    ),
}  # fmt: skip
"""The fine-tunings of both papers. SLaK's follow ConvNeXt's; SW's 3-D detector that of UniRepLKNet."""

_STAGE = re.compile(r"(?:^|\.)stages\.(\d+)\.(\d+)\.")
_ENTRANCE = re.compile(r"(?:^|\.)downsample_layers\.(\d+)\.")


def layer_group(name: str, layers: int = 12) -> int:
    """The group of a parameter for layer-wise learning rates, as ConvNeXt, SLaK and SW divide their networks.

    The stem is 0, the first stage 1, the second with what leads into it 2, three blocks of the third each are one more,
    the last stage with what leads into it is ``layers``, and norm, classifier or detector are ``layers + 1``. The
    learning rate of group k is ``lr * layer_decay ** (layers + 1 - k)``.

    Args:
        name: of the parameter, ``stages.2.4.pwconv1.weight``, with any prefix.
        layers: how many groups are counted; what lies beyond is in the last ones.
    """
    if (found := _STAGE.search(name)) is not None:
        stage, block = int(found[1]), int(found[2])
        return (1, 2, min(3 + block // 3, layers), layers)[min(stage, 3)]
    if (found := _ENTRANCE.search(name)) is not None:
        return (0, 2, 3, layers)[min(int(found[1]), 3)]
    return layers + 1
