"""What the three published networks share: four stages, a pooled head, and the interface that timm expects."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.layers.norm import LayerNorm2d
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import nn

__all__ = ["StagedNet", "drop_path_rates", "init_truncated_normal", "require_stages"]

STAGES = 4
POOLINGS = ("avg", "max", "avgmax", "")


def require_stages(model: str, *, fifth: str = "", **settings: Sequence[Any]) -> None:
    """Raise ValueError unless every one of `settings` has one entry per stage; `kernel_size` one more, if a `fifth`."""
    for name, value in settings.items():
        count, entries = STAGES, "one per stage"
        if fifth and name == "kernel_size":
            count, entries = STAGES + 1, f"one per stage and {fifth}"
        if len(value) != count:
            raise ValueError(f"{model}: {name}={value!r} has {len(value)} entries, expected {count}, {entries}")


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic-depth rates of every block, stage by stage, rising linearly from 0 to `rate`."""
    last = max(sum(depths) - 1, 1)
    starts = [sum(depths[:stage]) for stage in range(len(depths))]
    return [[rate * (start + i) / last for i in range(depth)] for start, depth in zip(starts, depths, strict=True)]


def init_truncated_normal(module: nn.Module) -> None:
    """Initialise the convolutions and linear layers of `module` as ConvNeXt does: deviation 0.02, no bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class StagedNet(nn.Module):
    """Base of the networks here: four stages at 1/4, 1/8, 1/16 and 1/32 of the input, then pooling, norm and head.

    A subclass registers ``downsample_layers`` (what leads into each stage), ``stages``, each a Sequential of blocks,
    and ``norm``, and calls `reset_classifier` at the end of its constructor.

    Args:
        dims: channels of the four stages.
        in_chans: channels of the input image.
        drop_rate: dropout in front of the classifier.
    """

    downsample_layers: nn.ModuleList
    stages: nn.ModuleList
    norm: nn.Module
    global_pool: SelectAdaptivePool2d
    head: nn.Module

    def __init__(self, dims: Sequence[int], in_chans: int, drop_rate: float) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**stage, "module": f"stages.{stage}"} for stage, dim in enumerate(dims)
        ]
        self.grad_checkpointing = False
        self.head_drop = nn.Dropout(drop_rate)

    def _finish(
        self,
        dims: Sequence[int],
        num_classes: int,
        global_pool: str,
        head_init_scale: float,
        stage_norms: bool = False,
    ) -> None:
        """The end of a constructor: norm, classifier, and the first weights of every layer.

        With `stage_norms` each stage's features get a LayerNorm of their own, under the published names ``norm0`` to
        ``norm3``.
        """
        self.norm = LayerNorm2d(dims[-1], eps=1e-6)
        self.reset_classifier(num_classes, global_pool)
        init_truncated_normal(self)
        if isinstance(self.head, nn.Linear):
            self.head.weight.data.mul_(head_init_scale)
        for stage, dim in enumerate(dims if stage_norms else ()):
            self.add_module(f"norm{stage}", LayerNorm2d(dim, eps=1e-6))

    def entrances(self) -> list[nn.Module]:
        """The stem and the downsampling layers, one in front of every stage."""
        return list(self.downsample_layers)

    def blocks(self, stage: int) -> nn.Module:
        """The Sequential of the blocks of a stage."""
        return self.stages[stage]

    def keep_stages(self, count: int) -> None:
        """Drop every stage after the first `count`."""
        self.downsample_layers = self.downsample_layers[:count]
        self.stages = self.stages[:count]
        for stage in range(count, STAGES):
            self._modules.pop(f"norm{stage}", None)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Pool and normalise: (B, C, H, W) to (B, C, 1, 1), or to (B, C, H, W) where ``global_pool`` is empty."""
        return self.norm(self.global_pool(x))

    def run_stage(self, stage: int, x: torch.Tensor) -> torch.Tensor:
        """The blocks of a stage, recomputed in the backward pass where gradient checkpointing is on."""
        if self.grad_checkpointing:
            return checkpoint_seq(self.blocks(stage), x)
        return self.stages[stage](x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Stage outputs, (B, dims[i], H / 2^(i+2), W / 2^(i+2)), as timm's feature wrappers ask for them.

        Args:
            x: images (B, in_chans, H, W).
            indices: stages to return; all if None, the last n if an integer.
            norm: not supported, since the final norm belongs to the pooled head.
            stop_early: leave out the stages after the last one asked for.
            output_fmt: 'NCHW', the only layout.
            intermediates_only: return the list alone, without the final features.

        Raises:
            NotImplementedError: if `norm` is set or `output_fmt` is another layout.
        """
        where = f"{type(self).__name__}.forward_intermediates"
        if norm:
            raise NotImplementedError(f"{where}: norm=True is not supported, the final norm is part of the head")
        if output_fmt != "NCHW":
            raise NotImplementedError(f"{where}: output_fmt {output_fmt!r} is not supported ('NCHW' is)")
        wanted, last = feature_take_indices(len(self.stages), indices)
        taken = []
        for stage, entrance in enumerate(self.entrances()):
            if stop_early and stage > last:
                break
            x = self.run_stage(stage, entrance(x))
            if stage in wanted:
                own_norm = self._modules.get(f"norm{stage}")
                taken.append(x if own_norm is None else own_norm(x))
        return taken if intermediates_only else (x, taken)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the stage outputs `indices` do not need; returns those indices, counted from the first stage."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        shortened = last + 1 < len(self.stages)
        self.keep_stages(last + 1)
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to the last stage's output, (B, num_features, H / 32, W / 32)."""
        for stage, entrance in enumerate(self.entrances()):
            x = self.run_stage(stage, entrance(x))
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The last stage's output to logits (B, num_classes), or to features (B, num_features) with `pre_logits`."""
        x = self.pool(x)
        if not self.global_pool.is_identity():
            x = x.flatten(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The classifier: a Linear, or an Identity where num_classes is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place of the present one.

        Args:
            num_classes: outputs of the classifier; 0 for none.
            global_pool: 'avg', 'max', 'avgmax', or '' for none; None keeps the present pooling.

        Raises:
            ValueError: for another pooling, or for a classifier without pooling.
        """
        pooling = self.global_pool.pool_type if global_pool is None else global_pool
        where = f"{type(self).__name__}.reset_classifier"
        if pooling not in POOLINGS:
            raise ValueError(f"{where}: global_pool {pooling!r} is not one of {POOLINGS}")
        if num_classes > 0 and not pooling:
            raise ValueError(
                f"{where}: num_classes={num_classes} with global_pool='' (a classifier needs pooled features)"
            )
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=pooling)
        # A new classifier belongs where the rest of the network is, and in its precision.
        like = next(self.stages.parameters())
        self.head = nn.Linear(self.num_features, num_classes).to(like) if num_classes > 0 else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations.

        Outputs and gradients stay the same; in training, BatchNorm's running statistics see each batch twice.
        """
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters by depth, for layer-wise learning rates."""
        fine = [
            (r"^downsample_layers\.(\d+)", (0,)),
            (r"^stages\.(\d+)\.(\d+)", None),
            (r"^norm", MATCH_PREV_GROUP),
        ]
        return {
            "stem": r"^downsample_layers\.0",
            "blocks": r"^(?:downsample_layers|stages)\.(\d+)" if coarse else fine,
        }
